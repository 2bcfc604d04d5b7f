"""The laws of the method, for every family: identity, masking = pruning, cost, balance, refit."""

import copy
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.families import classifiers, sites
from kcrprune.measure.macs import count_macs
from kcrprune.method.budget import dense_widths, expected_macs, predicted_macs, widths_macs
from kcrprune.plan import AXES, ChannelPlan
from kcrprune.surgery.balance import balance_, balancing, head_moments
from kcrprune.surgery.expanded import expand_
from kcrprune.surgery.gated import add_gates_, harden_, remove_gates_
from kcrprune.surgery.pruned import apply_plan_, full_plan, qkv_rows
from kcrprune.surgery.refit import NormalEquations, refit_
from tests.conftest import TINY, Tiny, random_plan, relative_error

SEEDS = st.integers(0, 2**16)
MANY = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(MANY, max_examples=3)
each_tiny = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.label)


def cut(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    return apply_plan_(copy.deepcopy(model), plan)


@torch.no_grad()
def test_a_plan_that_keeps_all_leaves_the_output_bit_identical(tiny: Tiny):
    model = tiny.model()
    assert torch.equal(cut(model, full_plan(model, "tiny"))(tiny.images()), model(tiny.images()))


@each_tiny
@MANY
@given(seed=SEEDS)
def test_masking_is_pruning(tiny: Tiny, seed: int):
    model, images = tiny.model(seed), tiny.images(seed=seed)
    plan = random_plan(model, "tiny", seed)
    masked = copy.deepcopy(model)
    harden_(add_gates_(masked, AXES), plan)
    with torch.no_grad():
        assert relative_error(cut(model, plan)(images), masked(images)) <= 1e-5


@each_tiny
@FEW
@given(seed=SEEDS)
def test_predicted_macs_are_counted_macs_by_two_counters(tiny: Tiny, seed: int):
    model = tiny.model()
    plan = random_plan(model, "tiny", seed)
    pruned = cut(model, plan)
    predicted = predicted_macs(count_macs(model, tiny.input_size), sites(model), plan)
    assert predicted == count_macs(pruned, tiny.input_size)
    assert predicted == second_count(pruned, tiny)


def second_count(model: nn.Module, tiny: Tiny) -> int:
    """torch's own counter, in which one multiply-accumulate is two FLOPs."""
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        model(tiny.images(1))
    return counter.get_total_flops() // 2


@each_tiny
@FEW
@given(seed=SEEDS)
def test_expected_macs_of_hard_gates_are_the_plans(tiny: Tiny, seed: int):
    model = tiny.model()
    dense_macs, plan = count_macs(model, tiny.input_size), random_plan(model, "tiny", seed)
    gates = add_gates_(copy.deepcopy(model), AXES)
    harden_(gates, plan)
    for _, _, gate in gates:
        gate.logits.data = (gate.value * 2 - 1) * 100  # probabilities of exactly 0 and 1
    assert int(expected_macs(dense_macs, gates).round()) == predicted_macs(dense_macs, sites(model), plan)


@each_tiny
@FEW
@given(seed=SEEDS)
@torch.no_grad()
def test_an_expanded_network_computes_what_the_pruned_one_does(tiny: Tiny, seed: int):
    model, images = tiny.model(), tiny.images()
    plan = random_plan(model, "tiny", seed)
    pruned = refit_(cut(model, plan), model, sites(model), plan, [tiny.images(16, seed)])
    expanded = expand_(copy.deepcopy(model), pruned, sites(model), plan)
    assert relative_error(expanded(images), pruned(images)) <= 1e-5
    assert torch.equal(cut(expanded, plan)(images), pruned(images))


def test_gates_leave_and_return_a_dense_model(tiny: Tiny):
    model, images = tiny.model(), tiny.images()
    keys, expected = list(model.state_dict()), model(images)
    gates = add_gates_(model, AXES)
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
    rotated = balance_(copy.deepcopy(model), sites(model), [tiny.images(8, seed + 1)])
    with torch.no_grad():
        assert relative_error(rotated(images), model(images)) <= 1e-5


def test_balanced_moments_are_equal_diagonal_and_sorted(tiny: Tiny):
    model = tiny.model()
    batches = [tiny.images(16)]
    balance_(model, sites(model), batches)
    rotatable = [site for site in sites(model) if site.rotate_query]
    with torch.no_grad():
        moments = head_moments(model, rotatable, batches)
    for site in rotatable:
        query, key = moments[site.name].query, moments[site.name].key
        diagonal = query.diagonal(dim1=1, dim2=2)
        scale = diagonal.max()
        assert (query - torch.diag_embed(diagonal)).abs().max() <= 1e-4 * scale
        assert (query - key).abs().max() <= 1e-3 * scale
        assert (diagonal.diff() <= 1e-4 * scale).all()


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
    sums = NormalEquations.for_linear(linear)
    with torch.no_grad():
        sums.add_(linear, z[:15], y[:15])
        sums.add_(linear, z[15:], y[15:])
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
    refit_(pruned, model, sites(model), plan, batches)
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
    refitted = refit_(cut(model, plan), model, sites(model), plan, [images[:10], images[10:]])
    unfitted = cut(model, plan)
    for name, seen_at, kept in fitted_linears(model, plan):
        undone = copy.deepcopy(refitted)
        undone.get_submodule(name).load_state_dict(unfitted.get_submodule(name).state_dict())
        wanted = seen(model, seen_at, images)[..., kept]
        fit, before = ((seen(network, seen_at, images) - wanted).square().sum() for network in (refitted, undone))
        assert fit < before or before <= 1e-9 * wanted.square().sum(), name  # nothing was lost before it


def fitted_linears(model: nn.Module, plan: ChannelPlan) -> Iterator[tuple[str, str, list[int] | slice]]:
    """Every refitted linear, the module whose output shows what it was fitted to, and the dense channels it keeps."""
    for site, block in zip(sites(model), plan.blocks, strict=True):
        everything = slice(None)
        for entry in site.entry:
            inside = model.get_submodule(entry).named_modules()
            for name in [f"{entry}.{name}" for name, module in inside if isinstance(module, nn.Linear)]:
                yield name, name, everything
        yield site.qkv, site.qkv, qkv_rows(site, block)
        yield site.proj, f"{site.name}.{site.norm2}", everything
        yield site.fc1, site.fc1, list(block.mlp_hidden.indices)
        yield site.fc2, site.name, everything
    names = {module: name for name, module in model.named_modules()}
    for classifier in classifiers(model):
        yield names[classifier], names[classifier], slice(None)


def seen(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    """What a linear or a block puts out, or what a norm takes in."""
    found: list[torch.Tensor] = []
    module = model.get_submodule(name)
    takes_in = isinstance(module, nn.LayerNorm)

    def see(module: nn.Module, taken: tuple[torch.Tensor, ...], put: torch.Tensor) -> None:
        found.append(taken[0] if takes_in else put)

    hook = module.register_forward_hook(see)
    model(images)
    hook.remove()
    return found[0].double()


@torch.no_grad()
def test_refit_of_a_plan_that_keeps_all_changes_nothing(tiny: Tiny):
    model = tiny.model()
    plan = full_plan(model, "tiny")
    refitted = refit_(cut(model, plan), model, sites(model), plan, [tiny.images()])
    assert torch.equal(refitted(tiny.images()), model(tiny.images()))


def test_a_dense_block_costs_its_widths(tiny: Tiny):
    for site in sites(tiny.model()):
        attention = site.attn_tokens * (
            4 * site.width * site.heads * site.head_dim + 2 * site.window_tokens * site.heads * site.head_dim
        )
        mlp = 2 * site.tokens * site.width * site.hidden
        assert widths_macs(site, dense_widths(site)) == attention + mlp
