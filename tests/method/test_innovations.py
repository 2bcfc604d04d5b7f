"""Elimination and innovations against least squares on the data, brute force, and the refit itself."""

import copy
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kcrprune.families import sites
from kcrprune.method.innovations import InnovationBasis, elimination_order
from kcrprune.plan import Axis
from kcrprune.surgery.gated import GatedLinear, add_gates_, remove_gates_
from kcrprune.surgery.refit import NormalEquations
from kcrprune.training.innovations import innovation_bases
from tests.conftest import Tiny, relative_error

SEEDS = st.integers(0, 2**16)
MANY = settings(max_examples=10, deadline=None, derandomize=True)


def problem(seed: int, inputs: int = 6, outputs: int = 4, n: int = 200) -> tuple[Tensor, nn.Linear, Tensor]:
    """Correlated inputs (n, I), a linear, and a curvature (O, O)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(n, inputs, generator=generator) @ mix + torch.randn(inputs, generator=generator)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    half = torch.randn(outputs, outputs, generator=generator)
    return x, linear, half @ half.T


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.T.double(), correction=0)


def refitted_cost(x: Tensor, linear: nn.Linear, curvature: Tensor, gone: list[int]) -> float:
    """tr(S E) / 2 by least squares on the data: what the other inputs and a bias cannot make of the lost part."""
    x = x.double()
    kept = [i for i in range(x.shape[1]) if i not in gone]
    lost = x[:, gone] @ linear.weight.detach().double()[:, gone].T
    design = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    error = lost - design @ torch.linalg.lstsq(design, lost).solution
    return float((error @ curvature.double() * error).sum() / len(x) / 2)


@MANY
@given(seed=SEEDS)
def test_each_input_given_up_is_the_cheapest_after_a_refit_by_least_squares(seed: int):
    x, linear, curvature = problem(seed)
    gone: list[int] = []
    for chosen in elimination_order(linear.weight, covariance(x), curvature).tolist():
        costs = {i: refitted_cost(x, linear, curvature, [*gone, i]) for i in range(x.shape[1]) if i not in gone}
        assert costs[chosen] <= min(costs.values()) * 1.01 + 1e-9
        gone.append(chosen)


@MANY
@given(seed=SEEDS)
def test_greedy_is_near_the_best_subset(seed: int):
    x, linear, curvature = problem(seed, inputs=5)
    order = elimination_order(linear.weight, covariance(x), curvature).tolist()
    greedy = refitted_cost(x, linear, curvature, order[:2])
    every = [refitted_cost(x, linear, curvature, list(pair)) for pair in permutations(range(5), 2)]
    assert greedy <= sorted(every)[len(every) // 2]


def test_each_head_gives_up_one_input_a_round():
    x, linear, curvature = problem(3, inputs=8)
    order = elimination_order(linear.weight, covariance(x), curvature, heads=2)
    assert (order.view(4, 2) // 4).sort(dim=1).values.tolist() == [[0, 1]] * 4


@MANY
@given(seed=SEEDS)
def test_innovations_are_uncorrelated_and_bring_the_inputs_back(seed: int):
    x, linear, curvature = problem(seed)
    order = elimination_order(linear.weight, covariance(x), curvature)
    basis = InnovationBasis.of(x.mean(0).double(), covariance(x), order)
    innovations = (x - basis.mean) @ basis.analysis.T
    assert relative_error(innovations @ basis.synthesis.T + basis.mean, x) <= 1e-4
    moments = covariance(innovations)
    scale = moments.diagonal().sqrt()
    correlations = moments / torch.outer(scale, scale) - torch.eye(len(scale), dtype=torch.float64)
    assert correlations.abs().max() <= 0.05  # the ridge leaves a little


@MANY
@given(seed=SEEDS, count=st.integers(1, 5))
@torch.no_grad()
def test_closing_gates_along_the_order_is_cutting_and_refitting(seed: int, count: int):
    x, linear, curvature = problem(seed)
    order = elimination_order(linear.weight, covariance(x), curvature)
    gate = torch.ones(6)
    gate[order[:count]] = 0
    basis = InnovationBasis.of(x.mean(0).double(), covariance(x), order)
    gated = GatedLinear(linear, in_gate=Fixed(gate), basis=basis)(x)
    kept = order[count:].sort().values
    cut = nn.Linear(len(kept), 4)
    cut.weight.copy_(linear.weight[:, kept])
    cut.bias.copy_(linear.bias)
    sums = NormalEquations.for_linear(cut)
    sums.add_(cut, x[:, kept], linear(x))
    change = sums.correction(1e-9, bias=True).float()
    refitted = cut(x[:, kept]) + x[:, kept] @ change[:, :-1].T + change[:, -1]
    lost = (linear(x) - linear(x).mean(0)).norm()
    assert (gated - refitted).norm() <= 0.02 * lost


class Fixed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value


@pytest.mark.parametrize("axes", [("mlp_hidden", "attn_query", "attn_value"), ("mlp_io", "mlp_hidden", "heads")])
def test_open_gates_on_innovations_leave_and_return_the_network(tiny: Tiny, axes: tuple[Axis, ...]):
    model, images = tiny.model(), tiny.images()
    expected = model(images)
    found = sites(model)
    open_axes: dict[str, list[Axis]] = {site.name: [a for a in site.axes if a in axes] for site in found}
    before = copy.deepcopy(model.state_dict())
    bases = innovation_bases(model, open_axes, found, [tiny.images(16)], torch.Generator().manual_seed(0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(bases) == sum(("mlp_hidden" in a) + ("attn_value" in a and "heads" not in a) for a in open_axes.values())
    gates = add_gates_(model, axes, bases=bases)
    assert relative_error(model(images), expected) <= 1e-4
    remove_gates_(model, gates)
    assert torch.equal(model(images), expected)
    assert before.keys() == model.state_dict().keys()
