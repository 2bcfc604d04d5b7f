"""Scores against finite differences and brute force."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kcrprune.families import Group, groups_of
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores, random_scores
from kcrprune.training.search import start_logits_
from tests.tiny import Tiny, cost_of, gated


def scored(tiny: Tiny, images: torch.Tensor):
    model = tiny.model()
    gates = gated(model)
    return model, gates, fisher_scores(model, gates, [images], torch.Generator().manual_seed(3))


def first_hidden(model: torch.nn.Module) -> Group:
    return next(group for group in groups_of(model) if group.axis == "mlp_hidden")


def test_scores_are_half_the_mean_squared_gradients_of_single_images(tiny: Tiny):
    images = tiny.images(4)
    model, gates, scores = scored(tiny, images)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        labels = torch.multinomial(model(images).softmax(1), 1, generator=generator).squeeze(1)
    square = torch.zeros_like(gates.logits)
    for image, label in zip(images, labels, strict=True):
        gates.value = torch.ones_like(gates.logits).requires_grad_()
        loss = F.cross_entropy(model(image[None]), label[None])
        square += torch.autograd.grad(loss, [gates.value])[0].square()
    expected = gates.by_group(square / (2 * len(images)))
    for key, score in scores.items():
        assert torch.allclose(score, expected[key], rtol=1e-2, atol=1e-4 * float(expected[key].max()))


def test_scores_leave_the_gates_open_and_the_model_as_it_was(tiny_vit: Tiny):
    images = tiny_vit.images()
    model, _, _ = scored(tiny_vit, images)
    with torch.no_grad():
        assert torch.allclose(model(images), tiny_vit.model()(images), atol=1e-6)


def test_a_channel_that_does_nothing_scores_nothing(tiny: Tiny):
    model = tiny.model()
    group = first_hidden(model)
    gates = gated(model, ("mlp_hidden",))
    fc2 = model.get_submodule(group.readers[0].owner)
    assert isinstance(fc2.weight, torch.Tensor)
    with torch.no_grad():
        fc2.weight[:, 5] = 0
    hidden = fisher_scores(model, gates, [tiny.images(4)], torch.Generator().manual_seed(0))[group.key]
    if group.norm is None:  # else the others' statistics change
        assert hidden[5] == 0
    assert (hidden > 0).sum() > len(hidden) / 2


def test_a_backbone_without_a_head_is_scored_on_its_features(tiny_vit: Tiny):
    architecture = tiny_vit.architecture.model_copy(
        update={"arguments": {**tiny_vit.architecture.arguments, "num_classes": 0}}
    )
    bare = Tiny("bare", architecture, tiny_vit.input_size)
    _, _, scores = scored(bare, bare.images(4))
    assert all((score >= 0).all() and score.sum() > 0 for score in scores.values())


def test_a_projection_is_scored_on_its_features(tiny_vit: Tiny):
    """The Fisher information of features is that of a squared error: twice the features, four times the scores."""
    found = []
    for size in (1, 2):
        model = tiny_vit.model()
        model.load_state_dict(
            {name: value * (size if "head." in name else 1) for name, value in model.state_dict().items()}
        )
        gates, drawn = gated(model), torch.Generator().manual_seed(3)
        found.append(fisher_scores(model, gates, [tiny_vit.images(4)], drawn, "features"))
    assert all(torch.allclose(found[1][key], 4 * score, rtol=1e-3) for key, score in found[0].items())


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_baseline_scores_have_the_shapes_of_the_fisher_ones(tiny: Tiny, kind: str):
    cost = cost_of(tiny.model(), tiny)
    model, gates, fisher = scored(tiny, tiny.images())
    baseline = (
        magnitude_scores(model, gates, cost.contract.groups)
        if kind == "magnitude"
        else random_scores(gates, cost, torch.Generator().manual_seed(0))
    )
    assert {key: score.shape for key, score in baseline.items()} == {key: s.shape for key, s in fisher.items()}


def test_equal_scores_start_every_gate_undecided(tiny: Tiny):
    cost = cost_of(tiny.model(), tiny)
    gates = gated(tiny.model())
    assert start_logits_(gates, equal_scores(gates, cost), cost, spread=8.0) == 1.0
    assert (gates.logits == 0).all()


def test_magnitude_is_the_weight_that_a_cut_removes(tiny: Tiny):
    model = tiny.model()
    group = first_hidden(model)
    gates = gated(copy.deepcopy(model), ("mlp_hidden",))
    scores = magnitude_scores(model, gates, groups_of(model))
    removed = [
        model.get_submodule(slot.owner).weight.movedim(slot.dim, 0)[slot.start + 7]  # type: ignore[union-attr,operator]
        for slot in (*group.writers, *group.readers)
        if isinstance(model.get_submodule(slot.owner), torch.nn.Linear)
    ]
    assert torch.allclose(scores[group.key][7], sum(row.square().sum() for row in removed).detach())  # type: ignore[union-attr]
