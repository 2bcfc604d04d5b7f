"""What a plan may spend and on what: which groups are open to which widths, and how little that can cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

from kcrprune.errors import BudgetError
from kcrprune.families import Group, Key
from kcrprune.method.cost import Cost, Widths, dense_widths
from kcrprune.plan import AXES, ROUND_TO, Axis

C = TypeVar("C", bound=Cost)


@dataclass(frozen=True)
class Allowed(Generic[C]):
    """What may be spent and on what: the cost, and which groups are open to which widths."""

    cost: C
    groups: tuple[Group, ...]
    open: frozenset[Key]
    round_to: int | Mapping[Axis, int] = ROUND_TO
    min_width: float = 0.05  # smallest share of an axis that a block keeps; 0: whole branches may go
    went: frozenset[str] = frozenset()  # branches that an earlier run has taken
    nested: tuple[frozenset[Key], ...] = ()  # of each residual stream the groups that keep the first of its channels

    @property
    def opened(self) -> tuple[Group, ...]:
        """The groups that are open."""
        return tuple(group for group in self.groups if group.key in self.open)

    def levels(self, group: Group) -> list[int]:
        """Allowed widths of a group, ascending: multiples of the rounding, and the whole."""
        if group.key not in self.open:
            return [group.width]
        step, smallest = self.step(group), max(1, self.min_width * group.width)
        return [width for width in range(step, group.width, step) if width >= smallest] + [group.width]

    def step(self, group: Group, parts: int = 1) -> int:
        """Channels of one step of a width, or of one of its `parts`: heads go one by one, pairs together."""
        rounding = max(1, self.rounding(group.axis) // parts)
        return 1 if group.axis == "heads" else -(-rounding // group.span) * group.span

    def rounding(self, axis: Axis) -> int:
        """What kept widths of an axis are multiples of."""
        return self.round_to if isinstance(self.round_to, int) else self.round_to.get(axis, ROUND_TO)

    @cached_property
    def closing(self) -> dict[str, Group]:
        """Of each branch that may go the open group without which nothing of it is read."""
        closing = (g for g in self.opened if g.constant and not g.wide and (g.readers or g.axis == "heads"))
        found: dict[str, Group] = {}
        for group in closing:
            if self.min_width == 0 or group.site in self.went:
                found.setdefault(group.site, group)
        return found

    def gone(self, site: str) -> Widths:
        """The widths of a branch that has gone; the stream's own channels stay."""
        return {group.key: group.width if group.wide else 0 for group in self.groups if group.site == site}

    def least(self, site: str) -> Widths:
        """The smallest widths of a branch that is there."""
        return {group.key: self.levels(group)[0] for group in self.groups if group.site == site}

    def floor(self) -> int:
        """Cost of the smallest network that the open groups allow."""
        widths: dict[Key, int] = {}
        for site in dict.fromkeys(group.site for group in self.groups):
            widths |= self.gone(site) if site in self.closing else self.least(site)
        return self.cost_of(widths)

    def cost_of(self, widths: Mapping[Key, int]) -> int:
        """Cost of the network at these widths."""
        dense = dense_widths(self.groups)
        saved = (
            self.cost.of_site(site, dense) - self.cost.of_site(site, widths)
            for site in dict.fromkeys(group.site for group in self.groups)
        )
        return self.cost.dense - sum(saved)


def require_reachable(allowed: Allowed, target: float, asked: str = "") -> None:
    """BudgetError, with the smallest reachable share and the axes that would allow the target.

    `asked` is the target in the words of who asked for it, where they are others.
    """
    floor = allowed.floor() / allowed.cost.dense
    if floor <= target:
        return
    blocks = {group.block for group in allowed.groups if group.key in allowed.open}
    everything = {group.key: group for group in allowed.groups if group.block in blocks and not group.whole}
    opened = {axis for _, axis in allowed.open}
    reach = replace(allowed, open=frozenset(everything)).floor() / allowed.cost.dense
    there = {axis for _, axis in everything}
    missing = [axis for axis in AXES if axis in there - opened]
    least = replace(allowed, min_width=0).floor() / allowed.cost.dense
    if missing and reach <= target:
        way_out = f"opening {', '.join(missing)} as well reaches {_round_up(reach)}"
    elif least <= target:
        way_out = f"min_width 0, with which whole branches may go, reaches {_round_up(least)}"
    else:
        way_out = f"no choice of axes goes below {_round_up(min(reach, floor))} here"
    names = ", ".join(axis for axis in AXES if axis in opened) or "none"
    raise BudgetError(
        f"target {asked or f'{target:g}'} of the dense {allowed.cost.unit} is out of reach: the open axes ({names}) "
        f"go down to {_round_up(floor)}; {way_out}"
    )


def _round_up(share: float) -> str:
    return f"{-(-share * 1000 // 1) / 1000:.3f}"
