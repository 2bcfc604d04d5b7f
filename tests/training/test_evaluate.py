import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kcrprune.errors import DataError
from kcrprune.events import StageEnded, StageStarted, StepDone
from kcrprune.training.evaluate import Evaluation, evaluate


def batches(logits, labels, size=7):
    """The logits are the images; networks below pass them on."""
    return DataLoader(TensorDataset(logits, labels), batch_size=size)


def identity(images):
    return images


def test_figures_equal_those_counted_image_by_image():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator)
    labels = torch.randint(0, 9, (50,), generator=generator)
    found = evaluate(identity, batches(logits, labels), reference=lambda images: images.roll(1, dims=1))

    first = among_five = agreeing = 0
    loss = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(9), key=lambda i: -row[i])
        first += order[0] == label
        among_five += label in order[:5]
        agreeing += order[0] == (order[0] + 1) % 9
        loss += math.log(sum(math.exp(value) for value in row)) - row[label]
    assert found.images == 50
    assert found.top1 == first / 50
    assert found.top5 == among_five / 50
    assert found.loss == pytest.approx(loss / 50, rel=1e-5)
    assert found.agreement == agreeing / 50 == 0


@pytest.mark.parametrize("size", [1, 4, 50])
def test_figures_do_not_depend_on_the_batch_size(size):
    logits, labels = torch.randn(50, 9, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 9
    whole, parts = (evaluate(identity, batches(logits, labels, n), reference=torch.neg) for n in (50, size))
    assert (parts.top1, parts.top5, parts.agreement) == (whole.top1, whole.top5, whole.agreement)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_without_labels_only_the_agreement_is_known():
    logits = torch.randn(10, 4)
    found = evaluate(identity, batches(logits, torch.full((10,), -1)), reference=identity)
    assert found == Evaluation(images=10, agreement=1.0)


def test_images_without_a_label_do_not_count_as_wrong():
    logits = torch.eye(6)
    labels = torch.tensor([0, 1, -1, -1, 0, 5])
    found = evaluate(identity, batches(logits, labels))
    assert found.images == 6
    assert found.top1 == 3 / 4


def test_five_classes_or_fewer_have_no_top5():
    assert evaluate(identity, batches(torch.eye(5), torch.arange(5))).top5 is None


def test_a_label_without_a_class_is_refused():
    with pytest.raises(DataError, match="label 4 of an image is none of the network's 3 classes"):
        evaluate(identity, batches(torch.eye(3), torch.tensor([0, 4, 1])))


def test_a_reference_with_other_classes_is_refused():
    with pytest.raises(DataError, match="3 classes and the reference 2"):
        evaluate(identity, batches(torch.eye(3), torch.arange(3)), reference=lambda images: images[:, :2])


def test_no_images_are_refused():
    with pytest.raises(DataError, match="no image"):
        evaluate(identity, DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))))


def test_a_network_is_evaluated_in_eval_mode_and_gets_its_mode_back():
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 6).eval())
    images, labels = torch.randn(40, 6), torch.arange(40) % 6
    assert network[0].training
    found = [evaluate(network, batches(images, labels), reference=network) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].agreement == 1
    assert [module.training for module in network] == [True, False]


def test_the_mode_comes_back_when_evaluation_fails():
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    with pytest.raises(DataError):
        evaluate(network, batches(torch.eye(3), torch.tensor([0, 1, 9])))
    assert network.training


def test_a_listener_hears_every_batch():
    heard = []
    evaluate(identity, batches(torch.eye(6), torch.arange(6), 4), listener=heard.append)
    started, *steps, ended = heard
    assert started == StageStarted("evaluate", 2)
    assert steps == [StepDone("evaluate", 1), StepDone("evaluate", 2)]
    assert isinstance(ended, StageEnded)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("label", [1, -1])
def test_answers_that_are_no_finite_numbers_are_an_error_with_labels_and_without(value, label):
    logits, labels = torch.eye(6), torch.arange(6)
    logits[3, 2], labels[3] = value, label
    with pytest.raises(DataError, match="the network answers what are no finite numbers"):
        evaluate(identity, batches(logits, labels))


def test_features_that_are_no_finite_numbers_are_an_error():
    features = torch.randn(6, 4)
    ruined = features.clone()
    ruined[5, 0] = math.nan
    with pytest.raises(DataError, match="the network answers what are no finite numbers"):
        evaluate(lambda images: images, batches(ruined, torch.full((6,), -1)), outputs="features", reference=torch.neg)
