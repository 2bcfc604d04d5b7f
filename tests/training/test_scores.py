"""Scores against finite differences and brute force."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kcrprune.method.gates import Gates
from kcrprune.plan import AXES
from kcrprune.surgery.gated import add_gates_
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores, random_scores
from kcrprune.training.search import start_logits_
from tests.conftest import Tiny


def scored(tiny: Tiny, images: torch.Tensor):
    model = tiny.model()
    gates = add_gates_(model, AXES)
    return model, gates, fisher_scores(model, gates, [images], torch.Generator().manual_seed(3))


def test_scores_are_half_the_mean_squared_gradients_of_single_images(tiny: Tiny):
    images = tiny.images(4)
    model, gates, scores = scored(tiny, images)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        labels = torch.multinomial(model(images).softmax(1), 1, generator=generator).squeeze(1)
    squares = [torch.zeros_like(gate.logits) for _, _, gate in gates]
    for image, label in zip(images, labels, strict=True):
        for _, _, gate in gates:
            gate.value = torch.ones_like(gate.logits).requires_grad_()
        loss = F.cross_entropy(model(image[None]), label[None])
        for square, gradient in zip(squares, torch.autograd.grad(loss, values(gates)), strict=True):
            square += gradient.square()
    for square, (site, axis, _) in zip(squares, gates, strict=True):
        expected = square / (2 * len(images))
        assert torch.allclose(scores[site.name][axis].flatten(), expected, rtol=1e-2, atol=1e-4 * float(expected.max()))


def values(gates: Gates) -> list[torch.Tensor]:
    return [gate.value for _, _, gate in gates]


def test_scores_leave_the_gates_open_and_the_model_as_it_was(tiny_vit: Tiny):
    images = tiny_vit.images()
    model, _, _ = scored(tiny_vit, images)
    with torch.no_grad():
        assert torch.allclose(model(images), tiny_vit.model()(images), atol=1e-6)


def test_a_channel_that_does_nothing_scores_nothing(tiny: Tiny):
    model = tiny.model()
    gates = add_gates_(model, ("mlp_hidden",))
    fc2 = model.get_submodule(gates.sites[0].fc2)
    assert isinstance(fc2.weight, torch.Tensor)
    with torch.no_grad():
        fc2.weight[:, 5] = 0
    scores = fisher_scores(model, gates, [tiny.images(4)], torch.Generator().manual_seed(0))
    hidden = scores[gates.sites[0].name]["mlp_hidden"]
    assert hidden[5] == 0
    assert (hidden > 0).sum() > len(hidden) / 2


def test_a_backbone_without_a_head_is_scored_on_its_features(tiny_vit: Tiny):
    architecture = tiny_vit.architecture.model_copy(
        update={"arguments": {**tiny_vit.architecture.arguments, "num_classes": 0}}
    )
    bare = Tiny("bare", architecture, tiny_vit.input_size)
    _, _, scores = scored(bare, bare.images(4))
    assert all((score >= 0).all() and score.sum() > 0 for axes in scores.values() for score in axes.values())


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_baseline_scores_have_the_shapes_of_the_fisher_ones(tiny: Tiny, kind: str):
    model, gates, fisher = scored(tiny, tiny.images())
    baseline = (
        magnitude_scores(model, gates)
        if kind == "magnitude"
        else random_scores(gates, torch.Generator().manual_seed(0))
    )
    for site, axis, _ in gates:
        assert baseline[site.name][axis].shape == fisher[site.name][axis].shape


def test_equal_scores_start_every_gate_undecided(tiny: Tiny):
    gates = add_gates_(tiny.model(), AXES)
    assert start_logits_(gates, equal_scores(gates), spread=8.0) == 1.0
    assert all((gate.logits == 0).all() for _, _, gate in gates)


def test_magnitude_is_the_weight_that_a_cut_removes(tiny: Tiny):
    model = tiny.model()
    gates = add_gates_(copy.deepcopy(model), ("mlp_hidden",))
    scores = magnitude_scores(model, gates)
    site = gates.sites[0]
    fc1, fc2 = (model.get_submodule(name).weight for name in (site.fc1, site.fc2))
    assert isinstance(fc1, torch.Tensor)
    assert isinstance(fc2, torch.Tensor)
    expected = fc1[7].square().sum() + fc2[:, 7].square().sum()
    assert torch.allclose(scores[site.name]["mlp_hidden"][7], expected.detach())
