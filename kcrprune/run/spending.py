"""What a run may keep, in MACs or in time, and the plan that keeps to it; a time by the clock, before any refit."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kcrprune import processes
from kcrprune.errors import BudgetError
from kcrprune.measure.report import Timing
from kcrprune.measure.times import TimeTable
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.budget import Scores, solve
from kcrprune.method.cost import plan_widths
from kcrprune.method.time_cost import TimeCost
from kcrprune.plan import ChannelPlan, Frozen
from kcrprune.run.context import Context
from kcrprune.run.opening import Network, allowed, require_target
from kcrprune.run.pricing import Place, Times, memory_for, times_of
from kcrprune.run.timed import speed_of
from kcrprune.surgery.narrow import cut_

NEAR: Final = 0.03  # of a target in time: how far a measured time may lie from it
PLANS: Final = 5  # that are tried for a time, at most
SECONDS: Final = 4.0  # of timing each of them


@dataclass(frozen=True)
class Budget:
    """What a plan may keep of what."""

    allowed: Allowed[Any]
    target: float  # share of the dense cost
    asked: str = ""  # of a time: the words of who asked
    times: Times | None = None


class Tried(Frozen):
    """A plan for a share of the table's time, and what it takes by the clock."""

    share: float
    plan: ChannelPlan
    timing: Timing

    @property
    def ratio(self) -> float:
        """Of its time to the dense one."""
        assert self.timing.ratio is not None
        return self.timing.ratio

    @property
    def high(self) -> float:
        """The upper end of that."""
        assert self.timing.ratio_high is not None
        return self.timing.ratio_high

    def keeps(self, target: float) -> bool:
        """Whether it is no slower than may be missed."""
        return self.high <= (1 + NEAR) * target

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.timing.ratio_low:.3f} to {self.high:.3f})"


def require_spendable(context: Context, network: Network, place: Place | None) -> None:
    """BudgetError for what is known to be out of reach before anything is measured."""
    if place is None:
        require_target(context, network)
    elif place.given:
        budget(context, network, times_of(context, network, place))
    else:
        allowed(context, network)


def budget(context: Context, network: Network, times: Times | None) -> Budget:
    """What may be kept; BudgetError for a time that the open axes cannot reach, or that is reached already."""
    everything = allowed(context, network)
    if times is None:
        return Budget(everything, context.settings.target_flops)
    cost = TimeCost.of(times.table, times.kinds, everything.opened)
    rest = (everything.groups, everything.open, everything.round_to, everything.min_width)
    found: Allowed[TimeCost] = Allowed(cost, *rest, went=everything.went, nested=everything.nested)
    share, asked = _share(context.settings.target_latency, times.table)
    kept = found.cost_of(plan_widths(network.before)) / cost.dense if network.before else 1.0
    if share >= kept:
        raise BudgetError(
            f"target {asked}: {context.checkpoint} takes {kept:.3f} of the dense time already; give a smaller one"
        )
    require_reachable(found, share, asked)
    return Budget(found, share, asked, times)


def _share(asked: float | str | None, table: TimeTable) -> tuple[float, str]:
    """A target in time as a share of the dense time, and in words."""
    if isinstance(asked, str):
        share = float(asked.removesuffix("ms")) / table.dense_ms
        return share, f"{asked}, which is {share:.3g} of {table.dense_ms:.3g} ms,"
    assert asked is not None
    return asked, f"{asked:g}"


def planned(context: Context, network: Network, budget: Budget, scores: Scores) -> ChannelPlan:
    """The plan that keeps to the budget; of a time by the clock of this machine, where the table is its own.

    BudgetError where the clock says that no plan does. The first of several processes looks at it.
    """
    if budget.times is None or not budget.times.here:
        return solve(budget.allowed, scores, budget.target, network.name)
    with context.part("time plans"), memory_for(budget.times.table.batch):
        found = processes.of_first(lambda: [one.model_dump(mode="json") for one in _tried(network, budget, scores)])
    tried = [Tried.model_validate(one) for one in found]
    best = _best(tried, budget.target)
    context.record.decisions["times"] = [one.model_dump(mode="json", exclude={"plan"}) for one in tried]
    _judge(context, budget, tried, best)
    return best.plan


def _tried(network: Network, budget: Budget, scores: Scores) -> list[Tried]:
    """Plans whose share of the table's time is corrected by what the one before took, until one is near enough."""
    assert budget.times is not None
    share, tried = budget.target, list[Tried]()
    while len(tried) < PLANS:
        plan = solve(budget.allowed, scores, share, network.name)
        if any(plan == one.plan for one in tried):
            break
        pruned = cut_(copy.deepcopy(network.dense), plan)
        kept = network.cost.predicted(plan) / network.cost.dense
        timing = speed_of(network.dense, pruned, network.inputs, kept, SECONDS, budget.times.table.batch)
        tried.append(Tried(share=share, plan=plan, timing=timing))
        if (1 - NEAR) * budget.target <= tried[-1].ratio and tried[-1].keeps(budget.target):
            break
        share = _corrected(budget, tried)
    return tried


def _corrected(budget: Budget, tried: Sequence[Tried]) -> float:
    """The share to plan for next: between one that was too slow and one that was too fast, where there are both.

    Else the one that meets the target if what is saved is in proportion to what the table says. The width of an
    interval counts as far as the target may be missed by; a wide one would take all.
    """
    target, last = budget.target, tried[-1]
    slow = [one.share for one in tried if not one.keeps(target)]
    fast = [one.share for one in tried if one.keeps(target)]
    if slow and fast and max(fast) < min(slow):
        return (max(fast) + min(slow)) / 2
    took = last.ratio
    if last.share in slow:
        took = min(max(last.ratio, target) + NEAR * target, last.high - NEAR / 2 * target)
    saved = (1 - last.share) * (1 - target) / max(1 - took, 0.01)
    floor = budget.allowed.floor() / budget.allowed.cost.dense
    return min(max(1 - saved, floor), 0.999)


def _best(tried: Sequence[Tried], target: float) -> Tried:
    """The slowest that keeps to the target, else the fastest."""
    kept = [one for one in tried if one.keeps(target)]
    return max(kept, key=lambda one: one.ratio) if kept else min(tried, key=lambda one: one.high)


def _judge(context: Context, budget: Budget, tried: Sequence[Tried], best: Tried) -> None:
    """Says which plans were tried, and which one is taken; BudgetError for the smallest where that is too slow."""
    floor = budget.allowed.floor()
    if best.ratio > budget.target and budget.allowed.cost_of(plan_widths(best.plan)) <= floor:
        raise BudgetError(
            f"target {budget.asked} of the dense time is out of reach: the smallest plan that the open axes allow "
            f"takes {best}; give a larger one, or open more axes"
        )
    course = "; ".join(f"{one.share:.3f} by the table is {one} by the clock" for one in tried)
    context.say(f"target {budget.asked} of the dense time: {course}; taken: {best.ratio:.3f}")
    if not best.keeps(budget.target):
        context.say(
            f"the target may be missed: the upper end of the measured time, {best.high:.3f} of the dense one, lies "
            f"more than {NEAR:.0%} above it; a quieter machine tells more exactly",
            True,
        )
