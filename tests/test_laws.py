"""The laws of the method, for every family: identity, masking = pruning, cost, balance, refit."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kcrprune.families import Group, classifiers, contract_of, groups_of, owner_of
from kcrprune.families.observed import watching
from kcrprune.measure.macs import count_macs
from kcrprune.method.cost import dense_widths
from kcrprune.method.shift import ExpectedMacs
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.balance import balance_, balancing, head_moments, rotates
from kcrprune.surgery.gated import harden_, plan_mask, remove_gates_
from kcrprune.surgery.narrow import cut_, expand_, full_plan, index_map
from kcrprune.surgery.normal_equations import NormalEquations
from kcrprune.surgery.refit import refit_
from tests.tiny import TINY, Tiny, cost_of, gated, random_plan, relative_error, torch_macs

SEEDS = st.integers(0, 2**16)
MANY = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(MANY, max_examples=2)
each_tiny = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.label)


def cut(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    return cut_(copy.deepcopy(model), plan)


@torch.no_grad()
def test_a_plan_that_keeps_all_leaves_the_output_bit_identical(tiny: Tiny):
    model = tiny.model()
    assert torch.equal(cut(model, full_plan(model, "tiny"))(tiny.images()), model(tiny.images()))


@each_tiny
@MANY
@given(seed=SEEDS)
def test_masking_is_pruning(tiny: Tiny, seed: int):
    model, images = tiny.model(seed).double(), tiny.images(seed=seed).double()
    plan = random_plan(model, "tiny", seed)
    masked = copy.deepcopy(model)
    harden_(gated(masked), plan)
    with torch.no_grad():
        assert relative_error(cut(model, plan)(images), masked(images)) <= 1e-10


@each_tiny
@FEW
@given(seed=SEEDS)
def test_predicted_macs_are_counted_macs_by_two_counters(tiny: Tiny, seed: int):
    model = tiny.model()
    plan = random_plan(model, "tiny", seed)
    pruned = cut(model, plan)
    predicted = cost_of(model, tiny).predicted(plan)
    assert predicted == count_macs(pruned, tiny.input_size)
    assert predicted == torch_macs(pruned, tiny.images(1))


@each_tiny
@FEW
@given(seed=SEEDS)
@torch.no_grad()
def test_expected_macs_of_hard_gates_are_the_plans(tiny: Tiny, seed: int):
    model = tiny.model()
    cost, plan = cost_of(model, tiny), random_plan(model, "tiny", seed)
    gates = gated(copy.deepcopy(model))
    logits = (plan_mask(gates, plan) * 2 - 1) * 100  # probabilities of exactly 0 and 1
    assert int(ExpectedMacs(cost, gates)(logits).round()) == cost.predicted(plan)


@each_tiny
@FEW
@given(seed=SEEDS)
@torch.no_grad()
def test_an_expanded_network_computes_what_the_pruned_one_does(tiny: Tiny, seed: int):
    model, images = tiny.model(), tiny.images()
    plan = random_plan(model, "tiny", seed)
    pruned = cut(model, plan)
    for parameter in pruned.parameters():  # as after a training
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    expanded = expand_(copy.deepcopy(model), pruned, plan)
    assert relative_error(expanded(images), pruned(images)) <= 1e-5
    again = cut(expanded, plan)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in pruned.state_dict().items())
    assert relative_error(again(images), pruned(images)) <= 1e-5


def test_gates_leave_and_return_a_dense_model(tiny: Tiny):
    model, images = tiny.model(), tiny.images()
    keys, expected = list(model.state_dict()), model(images)
    gates = gated(model)
    assert relative_error(model(images), expected) <= 1e-6
    remove_gates_(model, gates)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), expected)


@each_tiny
@FEW
@given(seed=SEEDS)
def test_balance_leaves_the_output_unchanged(tiny: Tiny, seed: int):
    model = tiny.model(seed)
    images = tiny.images(4, seed)
    rotated = balance_(copy.deepcopy(model), groups_of(model), [tiny.images(8, seed + 1)])
    with torch.no_grad():
        assert relative_error(rotated(images), model(images)) <= 1e-5


def test_balanced_moments_are_equal_diagonal_and_sorted(tiny: Tiny):
    model = tiny.model()
    batches, groups = [tiny.images(16)], groups_of(model)
    balance_(model, groups, batches)
    pairs = [group for group in groups if rotates(group) and not group.readers]
    with torch.no_grad():
        moments = head_moments(model, pairs, batches)
    for group in pairs:
        query, key = moments[group.key].first, moments[group.key].second
        shares = [m / m.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for m in (query, key)]
        both = shares[0] + shares[1] if group.basis == "orthogonal" else query
        diagonal = both.diagonal(dim1=1, dim2=2)
        scale = diagonal.max()
        assert (both - torch.diag_embed(diagonal)).abs().max() <= 1e-4 * scale
        assert (diagonal.diff() <= 1e-4 * scale).all()
        if group.basis == "free":
            assert (query - key).abs().max() <= 1e-3 * scale


@MANY
@given(seed=SEEDS)
def test_balancing_inverts_itself(seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation, inverse = balancing(x @ x.transpose(1, 2), y @ y.transpose(1, 2))
    assert torch.allclose(rotation @ inverse, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), atol=1e-6)


@MANY
@given(seed=SEEDS, ridge=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_a_correction_is_the_ridge_solution_and_never_raises_the_error(seed: int, ridge: float):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(40, 5, generator=generator), torch.randn(40, 3, generator=generator)
    linear = nn.Linear(5, 3)
    sums = NormalEquations.empty(5, 3, z.device)
    with torch.no_grad():
        sums.add_(z[:15], (y - linear(z))[:15])
        sums.add_(z[15:], (y - linear(z))[15:])
        change = sums.correction(ridge, bias=True).float()
        before = y - linear(z)
        after = before - z @ change[:, :-1].T - change[:, -1]
    assert after.square().sum() <= before.square().sum() * (1 + 1e-6)
    # the second route: the stationarity of the ridge loss
    e = ridge * z.square().sum(0).mean()
    assert torch.allclose(z.T @ after, e * change[:, :-1].T, atol=1e-3)


def stream(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return cast(VisionTransformer, model).forward_features(images)


@torch.no_grad()
def test_refit_brings_the_stream_nearer_to_the_dense_one(tiny: Tiny):
    model = tiny.model()
    plan = random_plan(model, "tiny", 1)
    batches = [tiny.images(32, seed) for seed in range(4)]
    images = torch.cat(batches)
    pruned = cut(model, plan)
    before = relative_error(stream(pruned, images), stream(model, images))
    refit_(pruned, model, ordered_groups(model, tiny), plan, batches)
    after = relative_error(stream(pruned, images), stream(model, images))
    assert after < before


@each_tiny
@FEW
@given(seed=SEEDS)
@torch.no_grad()
def test_every_linear_is_nearer_to_what_it_is_fitted_to(tiny: Tiny, seed: int):
    """Each fit undone by itself, so that what the linear reads stays, leaves it farther from its target."""
    model, images = tiny.model(seed), tiny.images(24, seed)
    plan = random_plan(model, "tiny", seed)
    refitted = refit_(cut(model, plan), model, ordered_groups(model, tiny), plan, [images[:10], images[10:]])
    unfitted, fitted = cut(model, plan), list(fitted_linears(model, plan))
    places = {seen_at for _, seen_at, _ in fitted}
    dense, after = seen(model, places, images), seen(refitted, places, images)
    for name, seen_at, kept in fitted:
        linear = refitted.get_submodule(name)
        fitted_weights = copy.deepcopy(linear.state_dict())
        linear.load_state_dict(unfitted.get_submodule(name).state_dict())
        undone = seen(refitted, {seen_at}, images)
        linear.load_state_dict(fitted_weights)
        wanted = dense[seen_at][..., kept]
        fit, before = ((found[seen_at] - wanted).square().sum() for found in (after, undone))
        assert fit < before or before <= 1e-9 * wanted.square().sum(), name  # nothing was lost before it


def fitted_linears(model: nn.Module, plan: ChannelPlan) -> Iterator[tuple[str, str, list[int] | slice]]:
    """Every refitted linear, the module whose output shows what it was fitted to, and the dense channels it keeps."""
    index = index_map(model, groups_of(model), plan)
    every: list[int] | slice = slice(None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".downsample." in name:
            yield name, name, every
    for group in groups_of(model):
        for slot in () if group.wide or group.site in plan.gone else group.writers:
            if isinstance(owner_of(model, slot.owner), nn.Linear):
                yield slot.owner, slot.owner, index.get(f"{slot.owner}.weight", {}).get(0, every)
        for slot in () if group.wide else group.readers:
            yield slot.owner, (slot.owner if group.stream is None else group.behind or group.block), every
    names = {module: name for name, module in model.named_modules()}
    for classifier in classifiers(model):
        yield names[classifier], names[classifier], every


def seen(model: nn.Module, names: set[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What linears and blocks put out, or what norms take in, in one pass."""
    found: dict[str, torch.Tensor] = {}
    modules = {name: model.get_submodule(name) for name in names}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}

    def put(name: str, value: Any) -> None:
        found[name] = value.double()

    def told(name: str, linear: nn.Linear, taken: torch.Tensor) -> None:
        put(name, nn.functional.linear(taken, linear.weight, linear.bias))  # without biases beside it

    hooks = [
        module.register_forward_hook(
            lambda module, taken, out, name=name: put(name, taken[0] if isinstance(module, nn.LayerNorm) else out)
        )
        for name, module in modules.items()
        if name not in linears
    ]
    watchers = {
        name: lambda taken, _, name=name, linear=linear: told(name, linear, taken) for name, linear in linears.items()
    }
    with watching(model, watchers):
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_refit_of_a_plan_that_keeps_all_changes_nothing(tiny: Tiny):
    model = tiny.model()
    plan = full_plan(model, "tiny")
    refitted = refit_(cut(model, plan), model, ordered_groups(model, tiny), plan, [tiny.images()])
    assert torch.equal(refitted(tiny.images()), model(tiny.images()))


@pytest.mark.parametrize("label", ["vit", "swin_padded"])
def test_a_dense_branch_costs_what_the_formula_says(label: str):
    """The second route: A D (2 Q + V) + A T (Q + V) + A V D for attention, 2 N D H for an MLP."""
    tiny = next(tiny for tiny in TINY if tiny.label == label)
    cost = cost_of(tiny.model(), tiny)
    widths = dense_widths(cost.contract.groups)
    tokens, padded, window = (5, 5, 5) if label == "vit" else (196, 225, 25)
    block = next(iter(cost.contract.blocks))
    assert cost.of_site(f"{block}.attn", widths) == padded * (4 * 24 * 24 + 2 * window * 24)
    assert cost.of_site(f"{block}.mlp", widths) == 2 * tokens * 24 * 96


def ordered_groups(model: nn.Module, tiny: Tiny) -> tuple[Group, ...]:
    return contract_of(model, tiny.input_size).groups
