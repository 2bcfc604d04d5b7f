"""The budget: what a plan costs, and the plan that scores buy for a price.

Letters: N tokens of the MLP, A tokens of attention (window padding included), T tokens of a window, D width of the
stream, I channels that the MLP reads and writes, H hidden units, Q and V channels of all q heads and all v heads.
One block costs  A D (2 Q + V) + A T (Q + V) + A V D + 2 N I H  MACs.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kcrprune.errors import BudgetError
from kcrprune.families import BlockSite
from kcrprune.method.gates import Gates
from kcrprune.plan import AXES, Axis, BlockPlan, ChannelPlan, Kept

WINDOW = 0.005  # a plan lies within this share of the dense MACs below its target, where the widths allow it

Number = TypeVar("Number", int, Tensor)
Widths = dict[Axis, int]  # kept channels by axis; for the attention axes, of one head
Scores = Mapping[str, Mapping[Axis, Tensor]]  # by site, then axis: (channels,), or (h, d) for the attention axes


def block_macs(site: BlockSite, io: Number, hidden: Number, query: Number, value: Number) -> Number:
    """MACs of one block for one image; integers give an integer, expected counts an expectation."""
    per_token = site.width * (2 * query + value) + site.window_tokens * (query + value) + site.width * value
    return site.attn_tokens * per_token + 2 * site.tokens * (io * hidden)


def dense_widths(site: BlockSite) -> Widths:
    """What a block has before any cut."""
    return {
        "mlp_io": site.width,
        "mlp_hidden": site.hidden,
        "attn_query": site.head_dim,
        "attn_value": site.head_dim,
        "heads": site.heads,
    }


def widths_macs(site: BlockSite, widths: Widths) -> int:
    """MACs of a block that keeps these widths."""
    query, value = widths["heads"] * widths["attn_query"], widths["heads"] * widths["attn_value"]
    return block_macs(site, widths["mlp_io"], widths["mlp_hidden"], query, value)


def changed(widths: Widths, axis: Axis, width: int) -> Widths:
    """A copy in which one axis has another width."""
    copy = dict(widths)
    copy[axis] = width
    return copy


def predicted_macs(dense_macs: int, sites: Sequence[BlockSite], plan: ChannelPlan) -> int:
    """MACs of the network that a plan leaves; equal to the counted MACs of the cut network, as integers."""
    saved = (
        widths_macs(site, dense_widths(site)) - widths_macs(site, block.widths)
        for site, block in zip(sites, plan.blocks, strict=True)
    )
    return dense_macs - sum(saved)


def expected_block_macs(site: BlockSite, keep: Mapping[Axis, Tensor]) -> Tensor:
    """MACs of a block whose channels are kept with these probabilities (0/1 gives the exact count).

    `keep` holds (channels,) for the axes of the MLP and for heads, (h, d) for the attention axes; what it lacks is
    whole.
    """
    some = next(iter(keep.values()))
    heads = keep.get("heads", some.new_ones(site.heads))  # (h,)
    whole = some.new_full((site.heads,), float(site.head_dim))
    per_head = {axis: keep[axis].sum(1) if axis in keep else whole for axis in ("attn_query", "attn_value")}  # (h,)
    query, value = ((heads * per_head[axis]).sum() for axis in ("attn_query", "attn_value"))
    io = keep["mlp_io"].sum() if "mlp_io" in keep else some.new_tensor(site.width)
    hidden = keep["mlp_hidden"].sum() if "mlp_hidden" in keep else some.new_tensor(site.hidden)
    return block_macs(site, io, hidden, query, value)


def expected_macs(dense_macs: int, gates: Gates) -> Tensor:
    """MACs of the network when each channel is kept with its gate's probability; differentiable in the logits."""
    total = torch.tensor(float(dense_macs), dtype=torch.float64)
    for site in gates.sites:
        keep: dict[Axis, Tensor] = {
            axis: gates.shaped(site, axis, gate.keep_probability.double()) for axis, gate in gates.at(site).items()
        }
        if keep:
            saved = widths_macs(site, dense_widths(site)) - expected_block_macs(site, keep)
            total = total.to(saved) - saved
    return total


def channel_macs(site: BlockSite, axis: Axis) -> int:
    """MACs that one channel of an axis costs while everything else is whole; for `heads`, one head."""
    widths = dense_widths(site)
    saved = widths_macs(site, widths) - widths_macs(site, changed(widths, axis, widths[axis] - 1))
    return saved // site.heads if axis in ("attn_query", "attn_value") else saved


@dataclass(frozen=True)
class Purse:
    """What may be spent and on what: the open axes of each site, and the widths that are allowed."""

    dense_macs: int
    sites: tuple[BlockSite, ...]
    open_axes: Mapping[str, tuple[Axis, ...]]  # by site
    round_to: int = 8
    min_width: float = 0.05  # smallest share of an axis that a block keeps

    def levels(self, site: BlockSite, axis: Axis, step: int | None = None) -> list[int]:
        """Allowed widths of an axis, ascending: multiples of the rounding, and the whole."""
        whole = dense_widths(site)[axis]
        if axis not in self.open_axes.get(site.name, ()):
            return [whole]
        step = step or (1 if axis == "heads" else self.round_to)
        smallest = max(1, self.min_width * whole)
        return [width for width in range(step, whole, step) if width >= smallest] + [whole]

    def floor(self) -> int:
        """MACs of the smallest network that the open axes allow."""
        smallest: list[Widths] = [{axis: self.levels(site, axis)[0] for axis in AXES} for site in self.sites]
        saved = (
            widths_macs(site, dense_widths(site)) - widths_macs(site, widths)
            for site, widths in zip(self.sites, smallest, strict=True)
        )
        return self.dense_macs - sum(saved)


def require_reachable(purse: Purse, target: float) -> None:
    """BudgetError, with the smallest reachable share and the axes that would allow the target."""
    floor = purse.floor() / purse.dense_macs
    if floor <= target:
        return
    opened = {axis for axes in purse.open_axes.values() for axis in axes}
    everything = {site.name: site.axes for site in purse.sites if site.name in purse.open_axes}
    lowest = Purse(purse.dense_macs, purse.sites, everything, purse.round_to, purse.min_width)
    reach = lowest.floor() / purse.dense_macs
    missing = [axis for axis in AXES if axis not in opened and any(axis in axes for axes in everything.values())]
    way_out = (
        f"opening {', '.join(missing)} as well reaches {_round_up(reach)}"
        if missing and reach <= target
        else f"no choice of axes goes below {_round_up(min(reach, floor))} here"
    )
    names = ", ".join(axis for axis in AXES if axis in opened) or "none"
    raise BudgetError(
        f"target {target:g} of the dense MACs is out of reach: the open axes ({names}) go down to "
        f"{_round_up(floor)}; {way_out}"
    )


def _round_up(share: float) -> str:
    return f"{-(-share * 1000 // 1) / 1000:.3f}"


def solve(purse: Purse, scores: Scores, target: float, architecture: str) -> ChannelPlan:
    """The plan of at most `target` of the dense MACs that loses least score.

    Steps of every open axis are given up in the order of score lost for a MAC saved, until the target is met; what
    is then left over buys back the dearest steps that fit, in finer steps where whole multiples miss the window.
    BudgetError where the target is out of reach, and where a score is not a finite number.
    """
    require_reachable(purse, target)
    state = _State(purse, scores)
    limit = max(int(target * purse.dense_macs), purse.floor())  # a target that is the floor may round below it
    state.give_up_until(limit)
    step = purse.round_to
    while True:
        state.buy_back(limit, step)
        if step == 1 or state.macs > (target - WINDOW) * purse.dense_macs:
            break
        step = max(1, step // 2)
    return ChannelPlan(architecture=architecture, blocks=tuple(state.block(site) for site in purse.sites))


class _State:
    """Widths of every block while the solver trades them; `macs` is what they cost."""

    def __init__(self, purse: Purse, scores: Scores) -> None:
        self.purse = purse
        self.macs = purse.dense_macs
        self.widths = {site.name: dense_widths(site) for site in purse.sites}
        self.axes: list[tuple[BlockSite, Axis]] = [
            (site, axis) for site in purse.sites for axis in purse.open_axes.get(site.name, ())
        ]
        self.scores = {(site.name, axis): scores[site.name][axis].detach().double().cpu() for site, axis in self.axes}
        _require_finite(self.scores)
        self.lost = {key: _lost_below(score) for key, score in self.scores.items()}

    def give_up_until(self, limit: int) -> None:
        """Narrows step by step until the limit is met; a step too large for what is left to save comes last."""
        window = limit - WINDOW * self.purse.dense_macs
        levels: dict[tuple[str, Axis], list[int]] = {
            (site.name, axis): self.purse.levels(site, axis) for site, axis in self.axes
        }
        prices = {site.name: self._cheapest(site, levels) for site in self.purse.sites}
        by_name = {site.name: site for site in self.purse.sites}
        overshot: tuple[BlockSite, Axis, int] | None = None
        while self.macs > limit:
            name = min(prices, key=lambda name: prices[name][0])
            price, axis, width = prices[name]
            if price == float("inf") and overshot is not None:  # only steps that are too large are left
                self._set(*overshot)
                break
            if self.macs - self._saving(by_name[name], axis, width) < window:
                overshot = overshot or (by_name[name], axis, width)
                levels[name, axis] = [self.widths[name][axis]]
            else:
                self._set(by_name[name], axis, width)
            prices[name] = self._cheapest(by_name[name], levels)

    def _cheapest(self, site: BlockSite, levels: Mapping[tuple[str, Axis], list[int]]) -> tuple[float, Axis, int]:
        """(score lost for a MAC saved, axis, width) of the best next step down in a block."""
        best: tuple[float, Axis, int] = (float("inf"), "mlp_io", 0)
        for axis in self.purse.open_axes.get(site.name, ()):
            allowed = levels[site.name, axis]
            below = bisect_left(allowed, self.widths[site.name][axis])
            if below:
                width = allowed[below - 1]
                price = self._loss(site, axis, width) / max(1, self._saving(site, axis, width))
                best = min(best, (price, axis, width))
        return best

    def buy_back(self, limit: int, step: int) -> None:
        """Widens by steps of `step` whatever gives most score and still fits, until nothing fits."""
        while options := list(self._affordable(limit, step)):
            _, site, axis, width = max(options, key=lambda option: option[0])
            self._set(site, axis, width)

    def _affordable(self, limit: int, step: int) -> Iterator[tuple[float, BlockSite, Axis, int]]:
        for site, axis in self.axes:
            now, whole = self.widths[site.name][axis], dense_widths(site)[axis]
            width = min(whole, now + (1 if axis == "heads" else step))
            cost = -self._saving(site, axis, width)
            if now < width and self.macs + cost <= limit:
                yield -self._loss(site, axis, width) / max(1, cost), site, axis, width

    def _loss(self, site: BlockSite, axis: Axis, width: int) -> float:
        """Score lost by going from today's width to `width`; negative on the way up."""
        lost = self.lost[site.name, axis]
        return lost[width] - lost[self.widths[site.name][axis]]

    def _saving(self, site: BlockSite, axis: Axis, width: int) -> int:
        widths = self.widths[site.name]
        return widths_macs(site, widths) - widths_macs(site, changed(widths, axis, width))

    def _set(self, site: BlockSite, axis: Axis, width: int) -> None:
        self.macs -= self._saving(site, axis, width)
        self.widths[site.name][axis] = width

    def block(self, site: BlockSite) -> BlockPlan:
        """The best channels of every axis, at the widths that were bought."""
        widths = self.widths[site.name]
        heads = self._best(site, "heads", widths["heads"])
        return BlockPlan(
            site=site.name,
            mlp_io=self._best(site, "mlp_io", widths["mlp_io"]),
            mlp_hidden=self._best(site, "mlp_hidden", widths["mlp_hidden"]),
            heads=heads,
            attn_query=self._best_per_head(site, "attn_query", heads),
            attn_value=self._best_per_head(site, "attn_value", heads),
        )

    def _best(self, site: BlockSite, axis: Axis, count: int) -> Kept:
        whole = dense_widths(site)[axis]
        if count == whole:
            return Kept.all_of(whole)
        return _top(self.scores[site.name, axis], count)

    def _best_per_head(self, site: BlockSite, axis: Axis, heads: Kept) -> tuple[Kept, ...]:
        count = self.widths[site.name][axis]
        if count == site.head_dim:
            return (Kept.all_of(count),) * len(heads.indices)
        return tuple(_top(self.scores[site.name, axis][head], count) for head in heads.indices)


def _require_finite(scores: Mapping[tuple[str, str], Tensor]) -> None:
    for (name, axis), score in scores.items():
        if not score.isfinite().all():
            raise BudgetError(
                f"the scores of {axis} in {name} are not finite numbers, so nothing can be ranked by them; where a "
                "search ran, it diverged: lower search_lr or search_weight_lr"
            )


def _lost_below(score: Tensor) -> list[float]:
    """Score lost when only the best `width` channels stay, for width 0..channels (of every head, summed)."""
    ranked = score.sort(descending=True, dim=-1).values
    if ranked.ndim == 2:
        ranked = ranked.sum(0)
    tail = ranked.flip(0).cumsum(0).flip(0)
    return [*tail.tolist(), 0.0]


def _top(score: Tensor, count: int) -> Kept:
    best = score.topk(count).indices.sort().values
    return Kept(width=len(score), indices=tuple(best.tolist()))
