"""Gates: limits of the temperature, one sample a step, gradients."""

from itertools import pairwise

import pytest
import torch

from kcrprune.families import Group
from kcrprune.method.gates import Gates, temperature_at
from tests.tiny import Tiny, gated


def gate_with(logits: list[float]) -> Gates:
    gates = Gates([Group("mlp", "mlp_hidden", 1, len(logits))], torch.device("cpu"))
    gates.logits.data = torch.tensor(logits)
    return gates


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_a_cold_gate_is_zero_or_one_and_a_hot_one_is_half():
    gates = gate_with([-3.0, 3.0] * 50)
    gates.sample_(1e-4, noise(100))
    assert ((gates.value < 1e-6) | (gates.value > 1 - 1e-6)).float().mean() > 0.98
    gates.sample_(1e6, noise(100))
    assert torch.allclose(gates.value, torch.full((100,), 0.5), atol=1e-4)


def test_the_share_of_open_samples_is_the_keep_probability():
    gates = gate_with([0.7] * 20_000)
    gates.sample_(0.5, noise(20_000))
    expected = float(gates.logits[0].detach().sigmoid())
    assert float((gates.value > 0.5).float().mean()) == pytest.approx(expected, abs=0.01)


def test_logistic_noise_is_a_difference_of_gumbels():
    gates = gate_with([0.0] * 50_000)
    gates.sample_(1.0, noise(50_000))
    logistic = gates.value.detach().logit()
    gumbel = -torch.log(-torch.log(torch.rand(2, 50_000, generator=torch.Generator().manual_seed(1))))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.allclose(logistic.quantile(levels), (gumbel[1] - gumbel[0]).quantile(levels), atol=0.06)


def test_same_noise_same_sample_and_gradients_reach_the_logits():
    gates = gate_with([0.1, -0.2, 0.3])
    gates.sample_(1.0, noise(3, 5))
    first = gates.value
    gates.sample_(1.0, noise(3, 5))
    assert torch.equal(first, gates.value)
    gates.value.sum().backward()
    assert gates.logits.grad is not None
    assert (gates.logits.grad > 0).all()


@pytest.mark.parametrize("tie", ["", "neighbours", "halves"])
def test_a_gate_holds_the_channels_that_go_together(tie):
    group = Group("attn", "attn_query", 2, 6, tie=tie)
    gates = Gates([group], torch.device("cpu"))
    units = torch.arange(float(len(gates.logits)))
    gates.harden_(units)
    held = gates.channels(group).view(2, 6)
    for head in range(2):
        for unit in range(group.units):
            assert (held[head, list(group.channels([unit]))] == head * group.units + unit).all()
    assert torch.equal(gates.flat(gates.by_group(units)), units)


def test_a_forward_pass_samples_nothing(tiny: Tiny):
    model = tiny.model()
    gates = gated(model)
    gates.sample_(1.0, noise(len(gates.logits)))
    with torch.no_grad():
        assert torch.equal(model(tiny.images()), model(tiny.images()))


def test_gates_of_each_image_have_the_gradient_of_that_image_alone(tiny: Tiny):
    model, images = tiny.model(), tiny.images(3)
    gates = gated(model)
    together = image_gradients(model, gates, images)
    for index in range(3):
        [alone] = image_gradients(model, gates, images[index : index + 1])
        for group, part in gates:
            limit = 1e-4 * float(alone[part].abs().max()) + 1e-6
            assert torch.allclose(together[index, part], alone[part], atol=limit), group.key


def image_gradients(model, gates: Gates, images: torch.Tensor) -> torch.Tensor:
    gates.open_per_image_(len(images))
    loss = model(images).square().sum()
    return torch.autograd.grad(loss, [gates.value])[0]


def test_the_temperature_falls_geometrically_to_its_floor():
    course = [temperature_at(step, 11, 5.0, 0.05) for step in range(11)]
    assert course[0] == 5.0
    assert course[-1] == pytest.approx(0.05)
    ratios = [after / before for before, after in pairwise(course)]
    assert ratios == pytest.approx([ratios[0]] * 10)
