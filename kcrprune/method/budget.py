"""The plan that scores buy for a price.

What is minimised: the sum of the scores of the channels that go, under a limit on the cost; a problem of knapsacks
whose items multiply, which is NP-hard. What is done: steps of widths, and branches as a whole where they may go, are
given up in the order of score lost for cost saved, then what is left over buys back. How far that ends from an exact
solver: docs/method.md.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kcrprune.errors import BudgetError
from kcrprune.families import Group, Key
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.cost import Widths, dense_widths
from kcrprune.plan import PER_HEAD, ChannelPlan, Indices, Kept

TINY = 1e-300  # in place of a sum of scores that are all zero
WINDOW = 0.005  # a plan lies within this share of the dense cost below its target, where the widths allow it

Scores = Mapping[Key, Tensor]  # by group: (units,), or (h, units) for the axes inside heads


def solve(allowed: Allowed, scores: Scores, target: float, architecture: str | None) -> ChannelPlan:
    """The plan of at most `target` of the dense cost that loses least score.

    Steps of every open group are given up in the order of score lost for cost saved, until the target is met; what
    is then left over buys back the dearest steps that fit, in finer steps where whole multiples miss the window.
    BudgetError where the target is out of reach, and where a score is not a finite number.
    """
    require_reachable(allowed, target)
    state = _solved(allowed, scores, target, {})
    if orders := state.shared_orders():
        state = _solved(allowed, scores, target, orders)
    return ChannelPlan(architecture=architecture, groups=tuple(state.kept()), stream=state.stream())


def _solved(allowed: Allowed[Any], scores: Scores, target: float, orders: Mapping[Key, Tensor]) -> "_State":
    """The widths at a target, of groups that keep the first of their channels in an order where one is given."""
    state = _State(allowed, scores, orders)
    limit = max(int(target * allowed.cost.dense), allowed.floor())  # a target that is the floor may round below it
    state.give_up_until(limit)
    parts, coarsest = 1, max(allowed.rounding(group.axis) for group in allowed.groups)
    while True:
        state.buy_back(limit, parts)
        if parts >= coarsest or state.spent > (target - WINDOW) * allowed.cost.dense:
            return state
        parts *= 2


class _State:
    """Widths of every group while the solver trades them; `spent` is what they cost."""

    def __init__(self, allowed: Allowed, scores: Scores, orders: Mapping[Key, Tensor]) -> None:
        self.allowed = allowed
        self.spent = allowed.cost.dense
        self.widths = dense_widths(allowed.groups)
        self.open = allowed.opened
        self.by_site = {
            site: sorted((group for group in self.open if group.site == site), key=lambda group: group.axis)
            for site in dict.fromkeys(group.site for group in self.open)
        }
        self.levels = {group.key: allowed.levels(group) for group in self.open}
        self.spans = {group.key: group.span for group in self.open}
        self.closing = allowed.closing
        self.refused: list[tuple[str, Widths]] = []  # moves that overshoot, and do so as long as they are possible
        self.scores = {group.key: scores[group.key].detach().double().cpu() for group in self.open}
        _require_finite(self.scores)
        self.orders = orders
        self.lost = {
            group.key: _lost_below(group, self.scores[group.key], orders.get(group.key)) for group in self.open
        }

    def give_up_until(self, limit: int) -> None:
        """Narrows step by step until the limit is met; a step too large for what is left to save comes last."""
        window = limit - WINDOW * self.allowed.cost.dense
        prices = {site: self._cheapest(site) for site in self.by_site}
        while self.spent > limit:
            site = min(prices, key=lambda site: prices[site][0])
            price, move = prices[site]
            if price == float("inf") and self.refused:  # only steps that are too large are left
                self._set(*self._overshooting())
                break
            if self.spent - self._saving(site, move) < window:
                self.refused.append((site, move))
            else:
                self._set(site, move)
            prices[site] = self._cheapest(site)

    def _overshooting(self) -> tuple[str, Widths]:
        """Of the steps that were too large the first, unless a branch that goes loses less."""
        steps = [step for step in self.refused if not self._goes(*step)][:1]
        branches = [step for step in self.refused if self._goes(*step)]
        return min([*steps, *branches], key=lambda step: self._loss(*step))

    def _cheapest(self, site: str) -> tuple[float, Widths]:
        """(score lost for a unit of cost saved, widths) of the best next step down at a site."""
        best: tuple[float, Widths] = (float("inf"), {})
        for move in self._moves(site):
            price = self._loss(site, move) / max(1, self._saving(site, move))
            if price < best[0] and (site, move) not in self.refused:
                best = (price, move)
        return best

    def _moves(self, site: str) -> Iterator[Widths]:
        """Steps down of each group at a site, of all together where the cost asks for that, and to nothing at all."""
        if self._is_gone(site):
            return
        if site in self.closing:
            yield self.allowed.gone(site)
        ahead = self.allowed.cost.ahead
        for steps in range(1, ahead + 1):
            lower: dict[Key, int] = {}
            for group in self.by_site[site]:
                levels = self.levels[group.key]
                below = bisect_left(levels, self.widths[group.key])
                if below >= steps:
                    lower[group.key] = levels[below - steps]
            yield from ({key: width} for key, width in lower.items())
            if ahead > 1 and len(lower) > 1:
                yield lower

    def buy_back(self, limit: int, parts: int) -> None:
        """Widens by so small a part of a step whatever gives most score and still fits, until nothing fits."""
        while options := list(self._affordable(limit, parts)):
            _, site, move = max(options, key=lambda option: option[0])
            self._set(site, move)

    def _affordable(self, limit: int, parts: int) -> Iterator[tuple[float, str, Widths]]:
        for site, move in self._wider(parts):
            cost = -self._saving(site, move)
            if self.spent + cost <= limit:
                yield -self._loss(site, move) / max(1, cost), site, move

    def _wider(self, parts: int) -> Iterator[tuple[str, Widths]]:
        """Parts of a step up of each group; a branch that has gone comes back at its smallest, where that is better."""
        for group in self.open:
            now = self.widths[group.key]
            if not self._is_gone(group.site):
                wider = min(group.width, now + self.allowed.step(group, parts))
                yield from [(group.site, {group.key: wider})] if now < wider else []
            elif group is self.closing[group.site]:
                least = self.allowed.least(group.site)
                yield from [(group.site, least)] if self._loss(group.site, least) < 0 else []

    def _is_gone(self, site: str) -> bool:
        return self._goes(site, self.widths)

    def _goes(self, site: str, move: Widths) -> bool:
        return site in self.closing and move.get(self.closing[site].key) == 0

    def _loss(self, site: str, move: Widths) -> float:
        """Score lost by going from today's widths to those of `move`; negative on the way up.

        A branch that goes loses what its last channels are worth, and what it lost before is no loss any more.
        """
        if self._goes(site, move) or self._is_gone(site):
            return self._lost(site, {**self.widths, **move}) - self._lost(site, self.widths)
        spans = self.spans
        return sum(
            self.lost[key][width // spans[key]] - self.lost[key][self.widths[key] // spans[key]]
            for key, width in move.items()
        )

    def _lost(self, site: str, widths: Widths) -> float:
        """Score lost at a site that has these widths."""
        if self._goes(site, widths):
            return self.lost[self.closing[site].key][0]
        return sum(self.lost[group.key][widths[group.key] // group.span] for group in self.by_site[site])

    def _saving(self, site: str, move: Widths) -> int:
        cost = self.allowed.cost.of_site
        return cost(site, self.widths) - cost(site, {**self.widths, **move})

    def _set(self, site: str, move: Widths) -> None:
        self.spent -= self._saving(site, move)
        self.widths |= move

    def kept(self) -> Iterator[Kept]:
        """The best channels of every group, at the widths that were bought."""
        for group in self.allowed.groups:
            if group.axis == "heads":
                continue
            heads = self._heads(group)
            units = self.widths[group.key] // group.span
            chosen = [self._best(group, head, units) for head in heads]
            yield kept_of(group, heads, chosen)

    def _heads(self, group: Group) -> Indices:
        key: Key = (group.site, "heads")
        count = self.widths[key] if group.axis in PER_HEAD else group.heads
        return tuple(range(count)) if count in (0, group.heads) else _top(self.scores[key], count)

    def _best(self, group: Group, head: int, units: int) -> Indices:
        if units == group.units:
            return tuple(range(units))
        if group.key in self.orders:
            return tuple(sorted(self.orders[group.key][:units].tolist()))
        score = self.scores[group.key]
        return _top(score[head] if group.axis in PER_HEAD else score, units)

    def shared_orders(self) -> dict[Key, Tensor]:
        """The order in which the open groups of a stream are to keep its channels; none where all of them keep all.

        First the channels that most of them keep by themselves, then by their shares of the scores.
        """
        found: dict[Key, Tensor] = {}
        for keys in self.allowed.nested:
            here = [group for group in self.open if group.key in keys]
            worth = torch.zeros(here[0].width if here else 0, dtype=torch.float64)
            for group in here:
                score = self.scores[group.key]
                worth += score / score.sum().clamp_min(TINY) / (1 + len(here))
                worth[list(self._best(group, 0, self.widths[group.key]))] += 1
            found |= dict.fromkeys((group.key for group in here), worth.argsort(descending=True, stable=True))
        return found if any(self.widths[group.key] < group.width for group in self.open if group.key in found) else {}

    def stream(self) -> tuple[Indices, ...] | None:
        """The order of each stream's channels; None where all keep all."""
        if not self.orders:
            return None
        whole = {group.key: group.width for group in self.allowed.groups}
        found: list[Indices] = []
        for keys in self.allowed.nested:
            cut = [key for key in keys if self.widths[key] < whole[key]]
            found.append(tuple(self.orders[cut[0]].tolist() if cut else range(whole[min(keys)])))
        return tuple(found)


def kept_of(group: Group, heads: Iterable[int], units: Sequence[Iterable[int]]) -> Kept:
    """The entry of a plan that keeps some heads of a group and some units of each."""
    return Kept(
        site=group.site,
        axis=group.axis,
        heads=group.heads,
        width=group.width,
        kept_heads=tuple(heads),
        channels=tuple(group.channels(of_head) for of_head in units),
    )


def _require_finite(scores: Mapping[Key, Tensor]) -> None:
    for (site, axis), score in scores.items():
        if not score.isfinite().all():
            raise BudgetError(
                f"the scores of {axis} in {site} are not finite numbers, so nothing can be ranked by them; where a "
                "search ran, it diverged: lower search_lr or search_weight_lr"
            )


def _lost_below(group: Group, score: Tensor, order: Tensor | None) -> list[float]:
    """Score lost when only the best units stay, or the first of an order, for 0 units to all; of every head, summed."""
    ranked = score.sort(descending=True, dim=-1).values if order is None else score[order]
    if group.axis in PER_HEAD:
        ranked = ranked.sum(0)
    tail = ranked.flip(0).cumsum(0).flip(0)
    return [*tail.tolist(), 0.0]


def _top(score: Tensor, count: int) -> Indices:
    return tuple(score.topk(count).indices.sort().values.tolist())
