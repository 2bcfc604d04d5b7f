"""What widths cost: in time by a table, in MACs by their terms; and which widths are allowed, by hand."""

import re
from typing import Any

import pytest

from kcrprune.errors import BudgetError, ConfigError
from kcrprune.families import Group
from kcrprune.families.contract import Contract
from kcrprune.measure.times import BranchTimes, TimeTable
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.cost import MacCost, Side, Term, kept_count, plan_widths, with_width
from kcrprune.method.gates import temperature_at
from kcrprune.method.time_cost import TimeCost
from kcrprune.plan import ChannelPlan, Kept

QUERY, VALUE, HEADS = (Group("a", axis, 3, 8) for axis in ("attn_query", "attn_value", "heads"))
HIDDEN = Group("m", "mlp_hidden", 1, 20)
GRID = BranchTimes(axes={"mlp_hidden": (10, 20)}, ms=(0.5, 1.0))
TABLE = TimeTable(machine="x", threads=1, batch=1, rounds=7, dense_ms=2.5, branches={"mlp": GRID})


def test_time_is_counted_in_nanoseconds_of_the_branches_that_are_open():
    cost = TimeCost.of(TABLE, {"m": "mlp", "other": "nowhere"}, [HIDDEN])
    assert (cost.dense, cost.unit) == (2_500_000, "time")
    assert [cost.of_site("m", {HIDDEN.key: width}) for width in (20, 10, 15, 1)] == [
        1_000_000,
        500_000,
        750_000,
        500_000,
    ]
    assert cost.of_site("other", {}) == 0


@pytest.mark.parametrize(
    ("kinds", "group", "told"),
    [
        ({}, HIDDEN, "m is not called as a module, so it cannot be timed; give target_flops"),
        (
            {"m": "mlp of another width"},
            HIDDEN,
            "the table of times has no mlp_hidden of mlp of another width, as m is",
        ),
        ({"m": "mlp"}, Group("m", "mlp_hidden", 1, 21), "the table of times has no mlp_hidden of mlp, as m is"),
        ({"m": "mlp"}, Group("m", "mlp_io", 1, 20), "leave latency_table out, and this one is measured"),
    ],
)
def test_a_branch_that_the_table_lacks_is_refused(kinds: dict[str, str], group: Group, told: str):
    with pytest.raises(ConfigError, match=re.escape(told)):
        TimeCost.of(TABLE, kinds, [group])


def test_a_side_is_a_constant_and_so_many_times_what_is_kept():
    side = Side(3, {HIDDEN.key: 2, QUERY.key: 1})
    assert side.at({HIDDEN.key: 5, QUERY.key: 7}) == 3 + 10 + 7
    assert Side(4).at({}) == 4


def test_kept_channels_are_those_of_all_kept_heads():
    widths = {QUERY.key: 5, HEADS.key: 2, HIDDEN.key: 7}
    assert [kept_count(group, widths) for group in (QUERY, HEADS, HIDDEN)] == [10, 2, 7]
    assert with_width(widths, HIDDEN.key, 1) == widths | {HIDDEN.key: 1}
    assert widths[HIDDEN.key] == 7


def test_widths_of_a_plan_are_per_head_and_its_heads_those_of_the_site():
    kept = {"site": "a", "heads": 3, "width": 8, "kept_heads": (0, 2)}
    plan = ChannelPlan.model_validate(
        {
            "architecture": None,
            "groups": [
                kept | {"axis": "attn_query", "channels": ((0, 1), (2, 3))},
                kept | {"axis": "attn_value", "channels": ((0,), (2,))},
                Kept(site="m", axis="mlp_hidden", width=20, channels=((4, 5, 6),)),
            ],
        }
    )
    assert plan_widths(plan) == {QUERY.key: 2, VALUE.key: 1, HEADS.key: 2, HIDDEN.key: 3}


def mac_cost(rest: int = 0, *beside: Group) -> MacCost:
    """An MLP of 20 hidden units at 2 positions, 6 channels wide, and a rest that stays."""
    free: dict[str, tuple[Term, ...]] = {group.site: () for group in beside}
    terms = free | {"m": (Term(2, Side(6), Side(0, {HIDDEN.key: 1})), Term(2, Side(0, {HIDDEN.key: 1}), Side(6)))}
    return MacCost(480 + rest, Contract((*beside, HIDDEN), {}, {}), terms)


def test_macs_are_rows_times_both_sides():
    cost = mac_cost(20)
    assert [cost.of_site("m", {HIDDEN.key: width}) for width in (20, 5, 0)] == [480, 120, 0]
    assert cost.channel(HIDDEN) == 24
    plan = ChannelPlan(
        architecture=None, groups=(Kept(site="m", axis="mlp_hidden", width=20, channels=(tuple(range(5)),)),)
    )
    assert cost.predicted(plan) == 20 + 120


def allowed(*open_: Group, round_to: Any = 8, min_width: float = 0.05, rest: int = 0) -> Allowed:
    groups = (QUERY, HEADS, HIDDEN)
    return Allowed(mac_cost(rest, QUERY, HEADS), groups, frozenset(group.key for group in open_), round_to, min_width)


@pytest.mark.parametrize(
    ("round_to", "min_width", "widths"),
    [
        (8, 0.05, [8, 16, 20]),
        (8, 0.4, [8, 16, 20]),
        (8, 0.41, [16, 20]),
        (8, 1.0, [20]),
        (20, 0.05, [20]),
        (7, 0.05, [7, 14, 20]),
        (1, 0.9, [18, 19, 20]),
        ({"mlp_hidden": 5}, 0.05, [5, 10, 15, 20]),
        ({"heads": 5}, 0.05, [8, 16, 20]),
    ],
)
def test_widths_are_multiples_of_the_rounding_from_the_smallest_share_on_and_the_whole(round_to, min_width, widths):
    found = allowed(HIDDEN, round_to=round_to, min_width=min_width)
    assert found.levels(HIDDEN) == widths
    assert allowed(round_to=round_to, min_width=min_width).levels(HIDDEN) == [20], "what is not open is whole"
    assert found.opened == (HIDDEN,)


@pytest.mark.parametrize(
    ("group", "parts", "step"),
    [
        (HIDDEN, 1, 8),
        (HIDDEN, 2, 4),
        (HIDDEN, 16, 1),
        (HEADS, 1, 1),
        (Group("a", "attn_query", 3, 8, tie="neighbours"), 1, 8),
        (Group("a", "attn_query", 3, 8, tie="halves"), 8, 2),  # pairs go together
    ],
)
def test_a_step_is_the_rounding_or_a_part_of_it_and_heads_go_one_by_one(group: Group, parts: int, step: int):
    assert allowed(group).step(group, parts) == step


def test_the_floor_is_told_where_a_target_lies_below_it():
    open_ = allowed(HIDDEN, rest=120)
    assert open_.floor() == 120 + 8 * 24
    assert open_.cost_of({HIDDEN.key: 16, QUERY.key: 8, HEADS.key: 8}) == 120 + 16 * 24
    require_reachable(open_, 312 / 600)
    with pytest.raises(BudgetError) as refused:
        require_reachable(open_, 0.5, "5ms")
    assert str(refused.value) == (
        "target 5ms of the dense MACs is out of reach: the open axes (mlp_hidden) go down to 0.520; no choice of axes "
        "goes below 0.520 here"
    )
    with pytest.raises(BudgetError, match=r"^target 0\.1 of the dense MACs .* open axes \(none\) go down to 1\.000; "):
        require_reachable(allowed(), 0.1)


@pytest.mark.parametrize(
    ("step", "steps", "temperature"),
    [(0, 5, 4.0), (1, 5, 2.0), (2, 5, 1.0), (4, 5, 0.25), (9, 5, 0.25), (0, 1, 4.0), (0, 0, 4.0), (0.5, 5, 8**0.5)],
)
def test_the_temperature_falls_by_the_same_part_in_each_step(step: float, steps: int, temperature: float):
    assert temperature_at(step, steps, 4.0, 0.25) == pytest.approx(temperature)
