"""What a network costs in time at certain widths: read off a table of its branches that was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from kcrprune.errors import ConfigError
from kcrprune.families import Group
from kcrprune.measure.times import BranchTimes, TimeTable
from kcrprune.method.cost import Widths

NANOSECONDS: Final = 1_000_000  # of a millisecond; costs are integers


@dataclass(frozen=True)
class TimeCost:
    """Nanoseconds of a batch; what is in no branch (stem, norms, copies) is what the whole takes beyond them."""

    unit: ClassVar[str] = "time"
    ahead: ClassVar[int] = 4  # a kernel takes what its widest operand takes, and a clock is uneven

    dense: int
    branches: Mapping[str, BranchTimes]  # by site

    @classmethod
    def of(cls, table: TimeTable, kinds: Mapping[str, str], opened: Sequence[Group]) -> "TimeCost":
        """That of a network whose branches are of these kinds, by site; ConfigError for one that the table lacks."""
        for group in opened:
            kind = kinds.get(group.site)
            if kind is None:
                raise ConfigError(f"{group.site} is not called as a module, so it cannot be timed; give target_flops")
            branch = table.branches.get(kind)
            if branch is None or branch.dense.get(group.axis) != group.width:
                raise ConfigError(
                    f"the table of times has no {group.axis} of {kind}, as {group.site} is: it is of another network, "
                    "image size or choice of axes; leave latency_table out, and this one is measured"
                )
        sites = dict.fromkeys(group.site for group in opened)
        return cls(round(NANOSECONDS * table.dense_ms), {site: table.branches[kinds[site]] for site in sites})

    def of_site(self, site: str, widths: Widths) -> int:
        """Nanoseconds of one branch; 0 for one that stays whole, whose time is no part of this, or that has gone."""
        branch = self.branches.get(site)
        if branch is None or any(widths[site, axis] == 0 for axis in branch.axes):
            return 0
        return round(NANOSECONDS * branch.at({axis: widths[site, axis] for axis in branch.axes}))
