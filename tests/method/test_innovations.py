"""Elimination and innovations against least squares on the data, brute force, and the refit itself."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kcrprune.method import innovations as module
from kcrprune.method.innovations import Innovations, _lifted, elimination_order
from kcrprune.method.sums import gram
from kcrprune.surgery.gated import GatedLinear
from kcrprune.surgery.normal_equations import NormalEquations

SEEDS = st.integers(0, 2**16)
MANY = settings(max_examples=10, deadline=None, derandomize=True)


def problem(seed: int, inputs: int = 6, outputs: int = 4, n: int = 200) -> tuple[Tensor, nn.Linear, Tensor]:
    """Correlated inputs (n, I) far from zero, a linear, and a curvature (O, O)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(n, inputs, generator=generator) @ mix + 5 * torch.randn(inputs, generator=generator)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    half = torch.randn(outputs, outputs, generator=generator)
    return x, linear, half @ half.T


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.T.double(), correction=0)


def innovations(x: Tensor, linear: nn.Linear, curvature: Tensor) -> tuple[Tensor, Innovations]:
    order = elimination_order(linear.weight.detach(), covariance(x), curvature)
    return order, Innovations.of(x.mean(0).double(), covariance(x), order)


def refitted_cost(x: Tensor, linear: nn.Linear, curvature: Tensor, gone: list[int]) -> float:
    """tr(S E) / 2 by least squares on the data: what the other inputs and a bias cannot make of the lost part."""
    x = x.double()
    kept = [i for i in range(x.shape[1]) if i not in gone]
    lost = x[:, gone] @ linear.weight.detach().double()[:, gone].T
    design = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    error = lost - design @ torch.linalg.lstsq(design, lost).solution
    return float((error @ curvature.double() * error).sum() / len(x) / 2)


@MANY
@given(seed=SEEDS, heads=st.sampled_from([1, 2]))
def test_each_input_given_up_is_the_cheapest_of_its_head_after_a_refit_by_least_squares(seed: int, heads: int):
    x, linear, curvature = problem(seed)
    order = elimination_order(linear.weight, covariance(x), curvature, heads=heads).view(-1, heads)
    gone: list[int] = []
    for chosen in order.tolist():
        costs = {i: refitted_cost(x, linear, curvature, [*gone, i]) for i in range(6) if i not in gone}
        for head, index in enumerate(chosen):
            assert index * heads // 6 == head
            rivals = [cost for i, cost in costs.items() if i * heads // 6 == head]
            assert costs[index] <= min(rivals) * 1.01 + 1e-9
        gone += chosen


@MANY
@given(seed=SEEDS)
def test_greedy_pairs_cost_little_more_than_the_best(seed: int):
    x, linear, curvature = problem(seed, inputs=5)
    order = elimination_order(linear.weight, covariance(x), curvature).tolist()
    every = sorted(refitted_cost(x, linear, curvature, list(pair)) for pair in combinations(range(5), 2))
    assert refitted_cost(x, linear, curvature, order[:2]) <= every[2] * 1.01  # of ten


def test_inputs_may_go_several_at_once(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 2)
    x, linear, curvature = problem(0)
    first = elimination_order(linear.weight, covariance(x), curvature)[:3].tolist()  # six in two rounds
    singles = sorted(range(6), key=lambda i: refitted_cost(x, linear, curvature, [i]))
    assert sorted(first) == sorted(singles[:3])


@pytest.mark.parametrize("waiting", [1, 7, 192])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("curvature", ["whole", "singular", "zero"])
def test_downdates_that_wait_leave_the_order_as_it_is(monkeypatch, curvature: str, heads: int, waiting: int):
    """Ties among inputs that nothing reads go by place in both."""
    monkeypatch.setattr(module, "ROUNDS", 5)
    monkeypatch.setattr(module, "WAITING", waiting)
    x, linear, whole = problem(3, inputs=36, outputs=9)
    weight = linear.weight.detach()
    weight[:, [2, 3, 17, 30]] = 0
    half = whole[:, :4]
    s = {"whole": whole, "singular": half @ half.T, "zero": 0 * whole}[curvature]
    order = elimination_order(weight, covariance(x), s, heads=heads)
    assert order.tolist() == one_after_the_other(weight.double(), _lifted(covariance(x)), s.double(), heads)


def one_after_the_other(weight: Tensor, covariance: Tensor, curvature: Tensor, heads: int) -> list[int]:
    """The order by a new inverse and new weights in every round."""
    inputs, left = weight.shape[1], list(range(weight.shape[1]))
    order: list[int] = []
    together = max(1, inputs // heads // module.ROUNDS)
    while left:
        rest = covariance[left][:, left].inverse()
        kept = weight[:, left] + weight[:, order] @ covariance[order][:, left] @ rest  # what is lost, made up for
        costs = (kept * (curvature @ kept)).sum(0) / rest.diagonal()
        by_cost = sorted(range(len(left)), key=lambda place: float(costs[place]))
        for head in range(heads):
            of_head = [left[place] for place in by_cost if left[place] // (inputs // heads) == head]
            order += of_head[:together]
        left = [index for index in left if index not in order]
    return order


@MANY
@given(seed=SEEDS)
def test_innovations_are_uncorrelated_and_bring_the_inputs_back(seed: int):
    x, linear, curvature = problem(seed)
    _, found = innovations(x, linear, curvature)
    residuals = (x - found.mean) @ found.analysis.T
    assert torch.allclose(residuals @ found.synthesis.T + found.mean, x, atol=1e-3)
    moments = covariance(residuals)
    scale = moments.diagonal().sqrt()
    correlations = moments / torch.outer(scale, scale) - torch.eye(len(scale), dtype=torch.float64)
    assert correlations.abs().max() <= 0.05  # the ridge leaves a little


@MANY
@given(seed=SEEDS, count=st.integers(1, 5))
@torch.no_grad()
def test_closing_gates_along_the_order_is_cutting_and_refitting(seed: int, count: int):
    x, linear, curvature = problem(seed)
    order, found = innovations(x, linear, curvature)
    gate = torch.ones(6)
    gate[order[:count]] = 0
    gated = GatedLinear(linear, in_gate=Fixed(gate), innovations=found)(x)
    kept = order[count:].sort().values
    cut = nn.Linear(len(kept), 4)
    cut.weight.copy_(linear.weight[:, kept])
    cut.bias.copy_(linear.bias)
    sums = NormalEquations.empty(len(kept), 4, x.device)
    sums.add_(x[:, kept], linear(x) - cut(x[:, kept]))
    change = sums.correction(1e-9, bias=True).float()
    refitted = cut(x[:, kept]) + x[:, kept] @ change[:, :-1].T + change[:, -1]
    corrected = (cut(x[:, kept]) - refitted).norm()  # what the refit has done
    assert (gated - refitted).norm() <= 0.02 * corrected


@torch.no_grad()
def test_open_gates_leave_the_output_as_it_is():
    x, linear, curvature = problem(1)
    _, found = innovations(x, linear, curvature)
    assert torch.equal(GatedLinear(linear, in_gate=Fixed(torch.ones(6)), innovations=found)(x), linear(x))


class Fixed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value


@pytest.mark.parametrize("size", [3, 512, 1030])
def test_a_gram_matrix_in_parts_is_the_product(size: int):
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)
