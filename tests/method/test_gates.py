"""Gates: limits of the temperature, one sample a step, gradients."""

import copy
from itertools import pairwise

import pytest
import torch

from kcrprune.method.gates import ChannelGate, temperature_at
from kcrprune.plan import AXES
from kcrprune.surgery.gated import add_gates_
from tests.conftest import Tiny


def gate_with(logits: list[float]) -> ChannelGate:
    gate = ChannelGate(len(logits), torch.device("cpu"))
    gate.logits.data = torch.tensor(logits)
    return gate


def test_a_cold_gate_is_zero_or_one_and_a_hot_one_is_half():
    gate = gate_with([-3.0, 3.0] * 50)
    gate.sample_(1e-4, torch.Generator().manual_seed(0))
    assert ((gate.value < 1e-6) | (gate.value > 1 - 1e-6)).float().mean() > 0.98
    gate.sample_(1e6, torch.Generator().manual_seed(0))
    assert torch.allclose(gate.value, torch.full((100,), 0.5), atol=1e-4)


def test_the_share_of_open_samples_is_the_keep_probability():
    gate = gate_with([0.7] * 20_000)
    gate.sample_(0.5, torch.Generator().manual_seed(0))
    expected = float(gate.keep_probability[0].detach())
    assert float((gate.value > 0.5).float().mean()) == pytest.approx(expected, abs=0.01)


def test_logistic_noise_is_a_difference_of_gumbels():
    gate = gate_with([0.0] * 50_000)
    gate.sample_(1.0, torch.Generator().manual_seed(0))
    noise = gate.value.detach().logit()
    gumbel = -torch.log(-torch.log(torch.rand(2, 50_000, generator=torch.Generator().manual_seed(1))))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.allclose(noise.quantile(levels), (gumbel[1] - gumbel[0]).quantile(levels), atol=0.06)


def test_same_seed_same_sample_and_gradients_reach_the_logits():
    gate = gate_with([0.1, -0.2, 0.3])
    gate.sample_(1.0, torch.Generator().manual_seed(5))
    first = gate.value
    gate.sample_(1.0, torch.Generator().manual_seed(5))
    assert torch.equal(first, gate.value)
    gate.value.sum().backward()
    assert gate.logits.grad is not None
    assert (gate.logits.grad > 0).all()


def test_a_forward_pass_samples_nothing(tiny: Tiny):
    model = tiny.model()
    gates = add_gates_(model, AXES)
    gates.sample_(1.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tiny.images()), model(tiny.images()))


def test_gates_of_each_image_have_the_gradient_of_that_image_alone(tiny: Tiny):
    model, images = tiny.model(), tiny.images(3)
    gates = add_gates_(model, AXES)
    together = image_gradients(model, gates, images)
    for index in range(3):
        alone = image_gradients(model, gates, images[index : index + 1])
        for whole, single in zip(together, alone, strict=True):
            assert torch.allclose(whole[index], single[0], atol=1e-4 * float(single.abs().max()) + 1e-6)


def image_gradients(model, gates, images):
    gates.open_per_image_(len(images))
    loss = model(images).square().sum()
    return torch.autograd.grad(loss, [gate.value for _, _, gate in gates])


def test_gates_survive_a_copy_of_the_model(tiny_vit: Tiny):
    model = tiny_vit.model()
    gates = add_gates_(model, AXES)
    gates.sample_(1.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _, _, gate in gates:
            gate.value = gate.value.detach()
        twin = copy.deepcopy(model)
        assert torch.equal(twin(tiny_vit.images()), model(tiny_vit.images()))


def test_the_temperature_falls_geometrically_to_its_floor():
    course = [temperature_at(step, 11, 5.0, 0.05) for step in range(11)]
    assert course[0] == 5.0
    assert course[-1] == pytest.approx(0.05)
    ratios = [after / before for before, after in pairwise(course)]
    assert ratios == pytest.approx([ratios[0]] * 10)
