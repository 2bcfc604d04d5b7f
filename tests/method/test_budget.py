"""The budget solver: targets are met, nothing cheap is thrown away, what is out of reach is refused."""

import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcrprune.artifact.artifact import open_model
from kcrprune.errors import BudgetError
from kcrprune.families import Group, Key, Slot, contract_of
from kcrprune.families.contract import Contract
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.budget import WINDOW, Scores, solve
from kcrprune.method.cost import MacCost, Side, Term, dense_widths, kept_count, plan_widths
from kcrprune.plan import AXES, PER_HEAD, Axis, ChannelPlan
from tests.tiny import TINY, Tiny, cost_of

SMOOTH: tuple[Axis, ...] = ("mlp_hidden", "attn_query", "attn_value")
WEIGHTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "weights"
MANY = settings(max_examples=20, deadline=None, derandomize=True)

# width, hidden units, heads, channels of a head, tokens, tokens of a window: DeiT-S at 224 px and one Swin stage
VIT, SWIN, SMALL = (384, 1536, 6, 64, 197, 197), (96, 384, 3, 32, 3136, 49), (16, 32, 1, 32, 20, 20)


def block(name: str, width: int, hidden: int, heads: int, dim: int, tokens: int, window: int):
    """The groups of one block and the terms of its cost, written down from the formula."""
    attn, mlp = f"{name}.attn", f"{name}.mlp"
    query: dict[Key, int] = {(attn, "attn_query"): 1}
    value: dict[Key, int] = {(attn, "attn_value"): 1}
    io: dict[Key, int] = {(mlp, "mlp_io"): 1}
    inner: dict[Key, int] = {(mlp, "mlp_hidden"): 1}
    groups = (
        *(Group(attn, axis, heads, dim) for axis in PER_HEAD),
        Group(attn, "heads", 1, heads),
        Group(mlp, "mlp_io", 1, width),
        Group(mlp, "mlp_hidden", 1, hidden),
    )
    terms = {
        attn: (
            Term(tokens, Side(0, {**dict.fromkeys(query, 2), **value}), Side(width)),  # qkv
            Term(tokens, Side(width), Side(0, value)),  # proj
            Term(tokens * window, Side(0, query | value), Side(1)),
        ),
        mlp: (Term(2 * tokens, Side(0, io), Side(0, inner)),),
    }
    return groups, terms


def allowed_for(sizes, depth: int, axes: tuple[Axis, ...], rest: int = 0, **limits) -> Allowed[MacCost]:
    groups, terms = (), {}
    for index in range(depth):
        more, further = block(f"blocks.{index}", *sizes)
        groups, terms = groups + more, terms | further
    widths = dense_widths(groups)
    cost = MacCost(0, Contract(groups, {}, {}), terms)
    cost = MacCost(rest + sum(cost.of_site(site, widths) for site in terms), cost.contract, terms)
    return Allowed(cost, groups, frozenset(g.key for g in groups if g.axis in axes), **limits)


def random_scores(groups: tuple[Group, ...], seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {
        group.key: torch.rand(
            (group.heads, group.units) if group.axis in PER_HEAD else (group.units,), generator=generator
        ).exp()
        for group in groups
    }


@pytest.mark.parametrize("sizes", [VIT, SWIN], ids=["vit", "swin"])
@MANY
@given(seed=st.integers(0, 2**16), target=st.sampled_from([0.9, 0.7, 0.5, 0.4]))
def test_a_plan_lies_just_below_its_target_in_whole_multiples(sizes, seed, target):
    allowed = allowed_for(sizes, 4, SMOOTH)
    plan = solve(allowed, random_scores(allowed.groups, seed), target, "x")
    assert target - WINDOW < allowed.cost.predicted(plan) / allowed.cost.dense <= target
    assert all(kept.kept_width % 8 == 0 for kept in plan.groups if kept.axis in SMOOTH)


@MANY
@given(seed=st.integers(0, 2**16))
def test_within_an_axis_the_best_channels_are_kept(seed):
    allowed = allowed_for(VIT, 1, AXES)
    scores = random_scores(allowed.groups, seed)
    for kept in solve(allowed, scores, 0.6, "x"):
        for head, channels in zip(kept.kept_heads, kept.channels, strict=True):
            score = scores[kept.key][head] if kept.axis in PER_HEAD else scores[kept.key]
            lost = sorted(set(range(kept.width)) - set(channels))
            assert not lost or score[list(channels)].min() >= score[lost].max()


@MANY
@given(seed=st.integers(0, 2**16), alike=st.booleans())
def test_groups_of_a_stream_keep_the_first_of_its_channels_in_one_order(seed, alike):
    allowed = allowed_for(VIT, 3, ("mlp_io", "mlp_hidden"))
    io = [group.key for group in allowed.groups if group.axis == "mlp_io"]
    nested, scores = replace(allowed, nested=(frozenset(io),)), dict(random_scores(allowed.groups, seed))
    if alike:
        scores |= {key: scores[io[0]] * (index + 1) for index, key in enumerate(io)}
    plan, free = (solve(each, scores, 0.5, "x") for each in (nested, allowed))
    assert plan.stream
    assert all(set(kept.channels[0]) == set(plan.stream[0][: kept.kept_width]) for kept in plan if kept.key in io)
    assert 0.5 - WINDOW < allowed.cost.predicted(plan) / allowed.cost.dense <= 0.5
    assert free.stream is None
    assert not alike or plan.groups == free.groups, "one order serves all, so nothing is lost by it"
    hidden = replace(nested, open=frozenset(key for key in nested.open if key not in io))
    assert solve(hidden, scores, 0.7, "x") == solve(replace(hidden, nested=()), scores, 0.7, "x"), "as it was"


@dataclass(frozen=True)
class Padded:
    """What a kernel costs that takes the widest of q and v, as it is measured; the linears around it cost nothing."""

    unit: ClassVar[str] = "time"
    ahead: ClassVar[int] = 4

    macs: MacCost

    @property
    def dense(self) -> int:
        return sum(self.of_site(site, dense_widths(self.macs.contract.groups)) for site in self.macs.contract.sites)

    def of_site(self, site: str, widths) -> int:
        queries = [widths[key] for key in widths if key[0] == site and key[1] in PER_HEAD]
        return 900 * max(queries) if queries else self.macs.of_site(site, widths)


def test_widths_that_save_nothing_alone_go_together():
    macs = allowed_for(SMALL, 1, SMOOTH, min_width=0.01)
    allowed = Allowed(Padded(macs.cost), macs.groups, macs.open, min_width=0.01)
    scores = {
        key: torch.full_like(score, 0.1 if key[1] in PER_HEAD else 1)
        for key, score in random_scores(allowed.groups, 0).items()
    }
    widths = plan_widths(solve(allowed, scores, 0.7, "x"))
    kept = {axis: widths[key] for key in widths if (axis := key[1]) in SMOOTH}
    assert kept == {"mlp_hidden": 32, "attn_query": 15, "attn_value": 15}


def removable(allowed: Allowed[MacCost]) -> Allowed[MacCost]:
    """The same where branches may go."""
    groups = tuple(
        replace(
            group,
            constant="proj",
            wide=group.axis == "mlp_io",
            readers=(Slot("proj", 1),) if group.axis in ("attn_value", "mlp_hidden") else (),
        )
        for group in allowed.groups
    )
    cost = replace(allowed.cost, contract=Contract(groups, {}, {}))
    return replace(allowed, cost=cost, groups=groups, min_width=0)


@MANY
@given(seed=st.integers(0, 2**16), target=st.sampled_from([0.8, 0.5, 0.3, 0.1]))
def test_where_branches_may_go_the_plan_is_hardly_worse_than_the_best_of_all_plans(seed, target):
    """The second route tries all widths, and the branches gone; what lies in one axis alone is lost with a branch."""
    allowed = removable(allowed_for(SMALL, 1, SMOOTH, rest=1000))
    scores = random_scores(allowed.groups, seed)
    smooth = [group for group in allowed.groups if group.axis in SMOOTH]
    dense, found = dense_widths(allowed.groups), plan_widths(solve(allowed, scores, target, "x"))
    of_heads = [(query, value, 1) for query, value in itertools.product((8, 16, 24, 32), repeat=2)]
    every = [
        dict(zip(dense, (*attention, 16, hidden), strict=True))
        for attention in (*of_heads, (0, 0, 0))
        for hidden in (0, 8, 16, 24, 32)
    ]
    affordable = [loss_where_branches_go(scores, w) for w in every if allowed.cost_of(w) <= target * allowed.cost.dense]
    assert allowed.cost_of(found) <= target * allowed.cost.dense
    step = max(float(scores[group.key].sum()) * 8 / scores[group.key].numel() for group in smooth)
    assert loss_where_branches_go(scores, found) <= min(affordable) + 2 * step


def loss_where_branches_go(scores: Scores, widths) -> float:
    gone = widths["blocks.0.attn", "attn_value"] == 0
    return loss_of({key: score for key, score in scores.items() if not (gone and key[1] == "attn_query")}, widths)


@pytest.mark.parametrize(("dear", "gone"), [("attn_query", True), ("attn_value", False)])
def test_a_branch_goes_where_its_values_are_worth_nothing(dear, gone):
    """Whatever q and k are worth: nobody reads them then."""
    allowed = removable(allowed_for(SMALL, 1, SMOOTH))
    scores = {
        key: torch.full_like(score, 1e-3 if key[1] in PER_HEAD and key[1] != dear else 1.0)
        for key, score in random_scores(allowed.groups, 0).items()
    }
    plan = solve(allowed, scores, 0.6, "x")
    assert plan.gone == ({"blocks.0.attn"} if gone else set())
    again = replace(allowed, min_width=0.05)
    assert not solve(again, scores, 0.6, "x").gone
    assert allowed.floor() < again.floor()
    with pytest.raises(BudgetError, match=r"min_width 0, with which whole branches may go, reaches 0\.0"):
        require_reachable(again, 0.01)


def test_a_branch_that_went_stays_gone_where_others_may_not_go():
    allowed = replace(removable(allowed_for(SMALL, 2, SMOOTH)), min_width=0.05, went=frozenset({"blocks.1.mlp"}))
    scores = {
        key: score * (key[0] not in allowed.went) for key, score in random_scores(allowed.groups, 0).items()
    }  # zero where it was
    assert solve(allowed, scores, 0.5, "x").gone == {"blocks.1.mlp"}


@MANY
@given(seed=st.integers(0, 2**16), target=st.sampled_from([0.8, 0.6]))
def test_the_greedy_plan_loses_hardly_more_than_the_best_of_all_plans(seed, target):
    """An exact solver, all widths tried: the plan is within two steps of it, and on average far nearer."""
    allowed = allowed_for(SMALL, 1, SMOOTH, min_width=0.01)
    scores = random_scores(allowed.groups, seed)
    smooth = [group for group in allowed.groups if group.axis in SMOOTH]
    found = plan_widths(solve(allowed, scores, target, "x"))
    lost = loss_of(scores, found)
    affordable = [
        loss_of(scores, widths)
        for chosen in itertools.product(*(allowed.levels(group) for group in smooth))
        if allowed.cost_of(
            widths := dense_widths(allowed.groups) | {g.key: w for g, w in zip(smooth, chosen, strict=True)}
        )
        <= target * allowed.cost.dense
    ]
    step = max(float(scores[group.key].sum()) * 8 / scores[group.key].numel() for group in smooth)
    assert lost <= min(affordable) + 2 * step


def loss_of(scores: Scores, widths) -> float:
    return sum(
        float(score.flatten().sort(descending=True).values[widths[key] :].sum())
        for key, score in scores.items()
        if key[1] in SMOOTH
    )


def test_an_unreachable_target_names_the_floor_and_the_way_out():
    allowed = allowed_for(VIT, 1, ("mlp_io",))
    with pytest.raises(BudgetError, match=r"target 0\.3 .* \(mlp_io\) go down to 0\.\d+; opening mlp_hidden"):
        require_reachable(allowed, 0.3)
    with pytest.raises(BudgetError, match="no choice of axes goes below"):
        require_reachable(allowed_for(VIT, 1, AXES, rest=10**12), 0.3)
    require_reachable(allowed, 0.9)


@pytest.mark.parametrize("rest", range(1, 12))
def test_the_floor_is_reached_exactly(rest: int):
    allowed = allowed_for(VIT, 2, AXES, rest=rest)
    for above in (0, 1e-9):
        target = allowed.floor() / allowed.cost.dense + above
        plan = solve(allowed, random_scores(allowed.groups, 0), target, "x")
        assert allowed.cost.predicted(plan) == allowed.floor()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused_by_name(wrong: float):
    allowed = allowed_for(VIT, 2, SMOOTH)
    scores = random_scores(allowed.groups, 0)
    scores["blocks.1.mlp", "mlp_hidden"][7] = wrong
    with pytest.raises(BudgetError, match=r"scores of mlp_hidden in blocks\.1\.mlp are not finite"):
        solve(allowed, scores, 0.7, "x")


def test_blocks_outside_the_open_axes_stay_whole():
    allowed = allowed_for(VIT, 2, SMOOTH)
    closed = Allowed(allowed.cost, allowed.groups, frozenset(key for key in allowed.open if key[0] > "blocks.1"))
    blocks = solve(closed, random_scores(allowed.groups, 0), 0.8, "x").blocks
    assert all(kept.is_all for kept in blocks["blocks.0"])
    assert not all(kept.is_all for kept in blocks["blocks.1"])


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.label)
def test_a_tiny_network_meets_its_target_from_below(tiny: Tiny):
    cost = cost_of(tiny.model(), tiny)
    groups = cost.contract.groups
    allowed = Allowed(cost, groups, frozenset(group.key for group in groups if not group.whole))
    target = max(0.7, allowed.floor() / cost.dense + 0.05)
    plan = solve(allowed, random_scores(groups, 0), target, "x")
    assert target - 0.1 < cost.predicted(plan) / cost.dense <= target


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "conv_hidden"])  # a ViT has none
def test_a_channel_costs_the_difference_that_it_makes(axis: Axis):
    cost = allowed_for(VIT, 1, AXES).cost
    group = next(group for group in cost.contract.groups if group.axis == axis)
    widths = dense_widths(cost.contract.groups)
    fewer = {**widths, group.key: widths[group.key] - 1}
    saved = cost.of_site(group.site, widths) - cost.of_site(group.site, fewer)
    assert cost.channel(group) == saved // (kept_count(group, widths) // group.width)


@dataclass(frozen=True)
class Milliseconds:
    """A table of times in place of MACs: what each width of an axis costs was measured, in microseconds."""

    unit: ClassVar[str] = "time"
    ahead: ClassVar[int] = 1

    groups: tuple[Group, ...]
    dense: int = 0

    def of_site(self, site: str, widths) -> int:
        """Steps of a kernel: a width costs what the next multiple of 32 costs."""
        return sum(-(-widths[group.key] // 32) * (30 + len(group.axis)) for group in self.groups if group.site == site)


def test_the_solver_asks_what_a_width_costs_and_does_not_know_the_unit():
    groups = allowed_for(VIT, 2, SMOOTH).groups
    cost = Milliseconds(groups)
    cost = replace(cost, dense=sum(cost.of_site(site, dense_widths(groups)) for site in {g.site for g in groups}))
    allowed = Allowed(cost, groups, frozenset(group.key for group in groups if group.axis in SMOOTH), round_to=32)
    plan = solve(allowed, random_scores(groups, 0), 0.6, "x")
    spent = allowed.cost_of(plan_widths(plan))
    assert 0.55 * cost.dense < spent <= 0.6 * cost.dense


def test_each_axis_has_a_rounding_of_its_own():
    allowed = replace(allowed_for(VIT, 2, SMOOTH), round_to={"mlp_hidden": 24, "attn_query": 5})
    levels = {group.axis: allowed.levels(group) for group in allowed.opened}
    assert {axis: widths[:2] for axis, widths in levels.items()} == {
        "mlp_hidden": [96, 120], "attn_query": [5, 10], "attn_value": [8, 16],
    }  # fmt: skip
    hidden = next(group for group in allowed.opened if group.axis == "mlp_hidden")
    assert [allowed.step(hidden, parts) for parts in (1, 2, 4, 8, 32)] == [24, 12, 6, 3, 1]


NETWORKS = ("deit", "swin", "tiny_vit")


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_are_those_that_were_made_before_there_were_groups(name: str):
    """Recorded from the solver over blocks; the same scores give the same channels, to the index."""
    recorded = json.loads((Path(__file__).parent / "plans_format_1.json").read_text())
    opened = open_model(WEIGHTS / f"{name}_cifar10.safetensors")
    cost = MacCost.of(opened.model, contract_of(opened.model, opened.preprocessing.input_size), recorded[name]["macs"])
    for label, axes in (("default", SMOOTH), ("every", AXES)):
        opened_keys = frozenset(group.key for group in cost.contract.groups if group.axis in axes)
        allowed = Allowed(cost, cost.contract.groups, opened_keys)
        scores = {group.key: drawn(group) for group in allowed.opened}
        for target in (0.7, 0.5, 0.35):
            assert digest_of(solve(allowed, scores, target, "x")) == recorded[name][f"{label} {target}"]


def drawn(group: Group) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{group.site}/{group.axis}".encode()).digest()[:4], "big")
    shape = (group.heads, group.width) if group.axis in PER_HEAD else (group.width,)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).exp() ** 4


def digest_of(plan: ChannelPlan) -> str:
    kept = sorted((k.site, k.axis, k.kept_heads, k.channels) for k in plan.groups)
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
