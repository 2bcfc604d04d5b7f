"""The budget solver: targets are met, nothing cheap is thrown away, what is out of reach is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcrprune.errors import BudgetError
from kcrprune.families import BlockSite, sites
from kcrprune.measure.macs import count_macs
from kcrprune.method.budget import (
    WINDOW,
    Purse,
    Scores,
    channel_macs,
    dense_widths,
    predicted_macs,
    require_reachable,
    solve,
    widths_macs,
)
from kcrprune.plan import AXES, Axis
from tests.conftest import TINY, Tiny

SMOOTH: tuple[Axis, ...] = ("mlp_hidden", "attn_query", "attn_value")
MANY = settings(max_examples=20, deadline=None, derandomize=True)

# DeiT-S at 224 px and one Swin stage, without building them
VIT_SITE = BlockSite("blocks.0", 384, 1536, 6, 64, 197, 197, 197, AXES)
SWIN_SITE = BlockSite("layers.0.blocks.0", 96, 384, 3, 32, 3136, 3136, 49, AXES)


def purse_for(found: tuple[BlockSite, ...], axes: tuple[Axis, ...], rest: int = 0, **limits) -> Purse:
    dense = rest + sum(widths_macs(site, dense_widths(site)) for site in found)
    return Purse(dense, found, {site.name: tuple(a for a in axes if a in site.axes) for site in found}, **limits)


def random_scores(found: tuple[BlockSite, ...], seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, dict[Axis, torch.Tensor]] = {site.name: {} for site in found}
    for site in found:
        for axis in site.axes:
            shape = (site.heads, site.head_dim) if axis.startswith("attn") else (dense_widths(site)[axis],)
            scores[site.name][axis] = torch.rand(shape, generator=generator).exp()
    return scores


def stack(site: BlockSite, depth: int) -> tuple[BlockSite, ...]:
    return tuple(BlockSite(f"{site.name}-{i}", *list(vars(site).values())[1:]) for i in range(depth))


@pytest.mark.parametrize("site", [VIT_SITE, SWIN_SITE], ids=["vit", "swin"])
@MANY
@given(seed=st.integers(0, 2**16), target=st.sampled_from([0.9, 0.7, 0.5, 0.4]))
def test_a_plan_lies_just_below_its_target_in_whole_multiples(site, seed, target):
    found = stack(site, 4)
    purse = purse_for(found, SMOOTH)
    plan = solve(purse, random_scores(found, seed), target, "x")
    share = predicted_macs(purse.dense_macs, found, plan) / purse.dense_macs
    assert target - WINDOW < share <= target
    for block in plan.blocks:
        for axis in SMOOTH:
            assert block.widths[axis] % 8 == 0


@MANY
@given(seed=st.integers(0, 2**16))
def test_within_an_axis_the_best_channels_are_kept(seed):
    purse = purse_for((VIT_SITE,), AXES)
    scores = random_scores((VIT_SITE,), seed)
    block = solve(purse, scores, 0.6, "x").blocks[0]
    hidden = scores["blocks.0"]["mlp_hidden"]
    dropped = sorted(set(range(1536)) - set(block.mlp_hidden.indices))
    if dropped:
        assert hidden[list(block.mlp_hidden.indices)].min() >= hidden[dropped].max()
    for head, kept in zip(block.heads.indices, block.attn_value, strict=True):
        lost = sorted(set(range(64)) - set(kept.indices))
        if lost:
            score = scores["blocks.0"]["attn_value"][head]
            assert score[list(kept.indices)].min() >= score[lost].max()


@MANY
@given(seed=st.integers(0, 2**16), target=st.sampled_from([0.8, 0.6]))
def test_the_greedy_plan_loses_hardly_more_than_the_best_of_all_plans(seed, target):
    site = BlockSite("b", 16, 32, 1, 32, 20, 20, 20, AXES)
    purse = purse_for((site,), SMOOTH, min_width=0.01)
    scores = random_scores((site,), seed)
    plan = solve(purse, scores, target, "x")
    lost = loss_of(scores["b"], plan.blocks[0].widths)
    levels = [purse.levels(site, axis) for axis in SMOOTH]
    affordable = [
        loss_of(scores["b"], dict(zip(SMOOTH, widths, strict=True)))
        for widths in itertools.product(*levels)
        if widths_macs(site, dense_widths(site) | dict(zip(SMOOTH, widths, strict=True))) <= target * purse.dense_macs
    ]
    step = max(float(scores["b"][axis].sum()) * 8 / scores["b"][axis].numel() for axis in SMOOTH)
    assert lost <= min(affordable) + 2 * step


def loss_of(scores, widths) -> float:
    total = 0.0
    for axis in SMOOTH:
        ranked = scores[axis].flatten().sort(descending=True).values
        total += float(ranked[widths[axis] :].sum())
    return total


def test_an_unreachable_target_names_the_floor_and_the_way_out():
    purse = purse_for((VIT_SITE,), ("mlp_io",))
    with pytest.raises(BudgetError, match=r"target 0\.3 .* \(mlp_io\) go down to 0\.\d+; opening mlp_hidden"):
        require_reachable(purse, 0.3)
    with pytest.raises(BudgetError, match="no choice of axes goes below"):
        require_reachable(purse_for((VIT_SITE,), AXES, rest=10**12), 0.3)
    require_reachable(purse, 0.9)


@pytest.mark.parametrize("rest", range(1, 12))
def test_the_floor_is_reached_exactly(rest: int):
    found = stack(VIT_SITE, 2)
    purse = purse_for(found, AXES, rest=rest)
    for above in (0, 1e-9):
        plan = solve(purse, random_scores(found, 0), purse.floor() / purse.dense_macs + above, "x")
        assert predicted_macs(purse.dense_macs, found, plan) == purse.floor()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused_by_name(wrong: float):
    found = stack(VIT_SITE, 2)
    scores = random_scores(found, 0)
    scores[found[1].name]["mlp_hidden"][7] = wrong
    with pytest.raises(BudgetError, match=r"scores of mlp_hidden in blocks\.0-1 are not finite"):
        solve(purse_for(found, SMOOTH), scores, 0.7, "x")


def test_blocks_outside_the_open_axes_stay_whole():
    found = stack(VIT_SITE, 2)
    purse = purse_for(found, SMOOTH)
    closed = Purse(purse.dense_macs, found, {found[1].name: SMOOTH})
    plan = solve(closed, random_scores(found, 0), 0.8, "x")
    assert plan.blocks[0].is_all
    assert not plan.blocks[1].is_all


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.label)
def test_a_tiny_network_meets_its_target_from_below(tiny: Tiny):
    model = tiny.model()
    macs, found = count_macs(model, tiny.input_size), sites(model)
    purse = Purse(macs, found, {site.name: site.axes for site in found})
    plan = solve(purse, random_scores(found, 0), 0.7, "x")
    assert 0.6 < predicted_macs(macs, found, plan) / macs <= 0.7


@pytest.mark.parametrize("axis", AXES)
def test_a_channel_costs_the_difference_that_it_makes(axis: Axis):
    widths = dense_widths(VIT_SITE)
    fewer = dict(widths)
    fewer[axis] -= 1
    saved = widths_macs(VIT_SITE, widths) - widths_macs(VIT_SITE, fewer)
    assert channel_macs(VIT_SITE, axis) == saved // (VIT_SITE.heads if axis.startswith("attn") else 1)
