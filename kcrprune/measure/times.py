"""How long the branches of a network take at which widths: a table that is measured, kept and passed on as JSON."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from kcrprune.errors import ConfigError
from kcrprune.plan import Axis, Frozen

LARGEST_FILE: Final = 2**24  # bytes; a table of ours takes some thousand
Points = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class BranchTimes(Frozen):
    """Milliseconds of one branch on a grid of widths, those of the dense one the last."""

    axes: Annotated[dict[Axis, Points], Field(min_length=1)]  # the widths that were measured, ascending
    ms: tuple[PositiveFloat, ...]  # of each combination of them; the last axis runs fastest

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(low >= high for points in self.axes.values() for low, high in pairwise(points)):
            raise ValueError("widths must ascend")
        if len(self.ms) != prod(map(len, self.axes.values())):
            raise ValueError(f"{len(self.ms)} times are not those of all combinations of the widths")
        return self

    @property
    def dense(self) -> dict[Axis, int]:
        """The widths before any cut."""
        return {axis: points[-1] for axis, points in self.axes.items()}

    @cached_property
    def _even(self) -> tuple[float, ...]:
        """The times without what an uneven clock makes of them: none is above that of greater widths.

        Half way between the least of all that are wider and the most of all that are narrower: the least alone would
        make what is cut look cheaper than it is.
        """
        places = list(product(*(range(len(points)) for points in self.axes.values())))
        least, most = (dict(zip(places, self.ms, strict=True)) for _ in range(2))
        for found, order, step, end in ((least, places[::-1], 1, min), (most, places, -1, max)):
            for place in order:
                beside = [(*place[:i], place[i] + step, *place[i + 1 :]) for i in range(len(place))]
                found[place] = end(found[place], *(found.get(one, found[place]) for one in beside))
        return tuple((least[place] + most[place]) / 2 for place in places)

    def at(self, widths: Mapping[Axis, int]) -> float:
        """Milliseconds at these widths: linear between those that were measured, never falling with a width.

        Below the smallest that was measured nothing more is saved.
        """
        total, stride = [(0, 1.0)], len(self.ms)
        for axis, points in self.axes.items():
            stride //= len(points)
            ends = _between(points, widths[axis])
            total = [(place + stride * index, share * part) for place, share in total for index, part in ends]
        return sum(share * self._even[place] for place, share in total)


def _between(points: Sequence[int], width: int) -> list[tuple[int, float]]:
    """The measured widths around one, by index, and how much of each it is."""
    above = next((index for index, point in enumerate(points) if point >= width), len(points) - 1)
    if above == 0 or points[above] <= width:
        return [(above, 1.0)]
    part = (width - points[above - 1]) / (points[above] - points[above - 1])
    return [(above - 1, 1 - part), (above, part)]


class TimeTable(Frozen):
    """What was measured on one machine: the dense network, and each kind of its branches by width."""

    format: Literal[1] = 1
    machine: str  # and what ran there
    threads: PositiveInt
    batch: PositiveInt  # images at once
    rounds: PositiveInt
    dense_ms: PositiveFloat  # of the whole network
    branches: dict[str, BranchTimes]  # by kind: class, what it is called with, widths


def read_times(path: Path) -> TimeTable:
    """The table in a file; ConfigError where there is none."""
    way_out = "name a times.json that a run with target_latency has written"
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"latency_table {path} cannot be read ({reason}); {way_out}") from None
    try:
        if len(text) > LARGEST_FILE:
            raise ConfigError(f"latency_table {path} is larger than any table of times; {way_out}")
        return TimeTable.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"latency_table {path} is no table of times ({where}: {reason}); {way_out}") from None
