"""Where times count, and the table that they are read off: one that is given, or one that is measured here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from kcrprune import processes
from kcrprune.errors import ConfigError, ran_out_of_memory
from kcrprune.measure.times import BranchTimes, TimeTable, read_times
from kcrprune.measure.timing import in_turn
from kcrprune.method.allowed import Allowed
from kcrprune.method.cost import Widths, dense_widths
from kcrprune.plan import Axis, canonical_json
from kcrprune.run.context import Context
from kcrprune.run.machine import processor_name
from kcrprune.run.opening import Network, allowed
from kcrprune.run.store import Result
from kcrprune.run.timed import usual_batch
from kcrprune.surgery.branches import Branch, branches_of

MEASURED: Final = 64  # combinations of widths of a kind of branch, at most
FINEST: Final = 8  # widths of an axis, at most
SECONDS, MOST = 4.0, 100  # of measuring, where that gives enough rounds; and rounds, at most

Grid = dict[Axis, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where times count, and the table that is given for it, which may be another place's."""

    machine: str
    threads: int
    batch: int
    given: TimeTable | None

    @property
    def fingerprint(self) -> str:
        """Of all that changes times."""
        given = self.given and self.given.model_dump(mode="json")
        return canonical_json([self.machine, self.threads, self.batch, given])

    @property
    def is_here(self) -> bool:
        """Whether what a clock shows here is what the table is about."""
        own = (self.machine, self.threads, self.batch)
        return self.given is None or own == (self.given.machine, self.given.threads, self.given.batch)


class Times(Result):
    """A table of times for the branches of a network; what is not from here, no clock of this machine can check."""

    table: TimeTable
    kinds: dict[str, str]  # of the branches that may be cut, by site
    here: bool


def open_place(context: Context, network: Network) -> Place | None:
    """Where times count, None where MACs do.

    ConfigError for a table that cannot be read, and for a network that cannot be timed.
    """
    settings = context.settings
    if not settings.timed:
        return None
    network.inputs(1)
    given = read_times(Path(settings.latency_table)) if settings.latency_table else None
    batch = settings.latency_batch or (given.batch if given else usual_batch(context.device))
    return Place(processor_name(context.device), torch.get_num_threads(), batch, given)


def price(context: Context, network: Network, place: Place | None) -> Times | None:
    """The table of times, measured where none is given; None where MACs count."""
    if place is None:
        return None
    with context.part("time branches"), memory_for(place.batch):
        found = processes.of_first(lambda: times_of(context, network, place).model_dump(mode="json"))
    return Times.model_validate(found)


@contextmanager
def memory_for(batch: int) -> Iterator[None]:
    """ConfigError with the way out where so many images at once take more memory than there is."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise ConfigError(
            f"memory ran out with {batch} images at once, which are timed; give a smaller latency_batch"
        ) from error


def times_of(context: Context, network: Network, place: Place) -> Times:
    """The given table with the kinds of a network's branches, or one that is measured."""
    opened, table = allowed(context, network), place.given
    sites = {group.site: network.cost.contract.sites[group.site] for group in opened.opened}
    images = network.inputs(place.batch if table is None else table.batch)
    kinds, branches = branches_of(network.dense, sites, images)
    if table is None:
        table = _measured(network, place, images, branches, {kind: grid(opened, b) for kind, b in branches.items()})
    return Times(table=table, kinds=kinds, here=place.is_here)


def grid(opened: Allowed[Any], branch: Branch) -> Grid:
    """The widths at which a branch is measured: all that may be planned, or some of them, evenly spread."""
    levels: dict[Axis, list[int]] = {
        group.axis: opened.levels(group) for group in branch.groups if group.key in opened.open
    }
    most = min(FINEST, int(MEASURED ** (1 / len(levels)) + 1e-9))
    return {axis: tuple(_spread(of_axis, most)) for axis, of_axis in levels.items()}


def _spread(levels: list[int], most: int) -> list[int]:
    """At most so many of the levels, the first and the last among them."""
    count = min(most, len(levels))
    return [levels[round(index * (len(levels) - 1) / max(1, count - 1))] for index in range(count - 1)] + levels[-1:]


def _measured(
    network: Network, place: Place, images: torch.Tensor, branches: Mapping[str, Branch], grids: Mapping[str, Grid]
) -> TimeTable:
    """The dense network and copies of its branches at all widths of their grids, called in turn."""
    calls: list[Any] = [lambda _: network.dense(images)]
    for kind, branch in branches.items():
        calls += [partial(_call, branch.at(widths)) for widths in _widths(branch, grids[kind])]
    times = in_turn([(call, images) for call in calls], seconds=SECONDS, most=MOST)
    dense, *rest = (round(median(of_one), 5) for of_one in times)
    own = iter(rest)
    found = {
        kind: BranchTimes(axes=grids[kind], ms=tuple(next(own) for _ in _widths(branch, grids[kind])))
        for kind, branch in branches.items()
    }
    return TimeTable(
        machine=place.machine,
        threads=place.threads,
        batch=place.batch,
        rounds=len(times[0]),
        dense_ms=dense,
        branches=found,
    )


def _call(branch: Any, images: object) -> object:
    return branch()


def _widths(branch: Branch, axes: Grid) -> Iterator[Widths]:
    """All combinations; the last axis runs fastest."""
    keys = {group.axis: group.key for group in branch.groups}
    for widths in product(*axes.values()):
        yield dense_widths(branch.groups) | {keys[axis]: width for axis, width in zip(axes, widths, strict=True)}
