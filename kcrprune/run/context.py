"""What every stage of a run is handed: its settings, and where it tells how it goes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Final, cast

import torch
from accelerate import Accelerator
from pydantic import BaseModel, Field

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.events import Listener, Note, StageEnded, StageStarted
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.measure.report import StageTime
from kcrprune.run.machine import forget_peak, peak_device_mib, peak_memory_mib
from kcrprune.training.images.unreadable import Replaced
from kcrprune.training.precision import gpu_fault, open_accelerator
from kcrprune.training.snapshots import NO_SNAPSHOTS, Snapshots

WAITED: Final = 0.2  # share of a stage that is worth a word
LONG: Final = 30.0  # seconds of a stage
ALL: Final = tuple(RunConfig.model_fields)
FREE: Final = {  # settings that change no result: a run may go on with others, and any stage may read them
    "recipe": "what it stands for is in the other settings",
    "tensorboard": "what is written beside the results",
    "workers": "who loads the images, not which",
    "snapshot_minutes": "how much a kill may cost",
    "max_memory": "where streams lie, not what they hold",
    "deterministic": "which of several roundings is taken, not what is computed",
    "bench": "what is timed once the network is made",
    "device": "where it is computed: a run that lost its GPU may end on the CPU",
}
PLACES: Final = ("data", "class_map", "teacher", "latency_table")  # where something lies; digests say what it is


class Record(BaseModel):
    """What a stage told while it was made: times of its parts, sentences, the course of a training, decisions."""

    times: list[StageTime] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    history: dict[str, list[dict[str, int | float | None]]] = Field(default_factory=dict)  # None: no finite number
    decisions: dict[str, Any] = Field(default_factory=dict)
    sent_bytes: int = 0  # by each of several processes, to the others


@dataclass
class Context:
    """One run for its stages; `settings` are those that the stage which is being made declares."""

    checkpoint: Path
    config: RunConfig
    listener: Listener
    origins: Mapping[str, str] = field(default_factory=dict)  # of settings: flag, file or recipe
    folder: Path | None = None  # the run's own; None while it may still be refused
    seconds_an_image: float | None = None  # of a plain pass of the dense network, once that is measured
    records: dict[str, Record] = field(default_factory=lambda: {"": Record()})  # by stage; "": outside any

    def __post_init__(self) -> None:
        self.device = open_accelerator(self.config.device, self.config.precision, shared=True).device
        if self.config.device == "auto" and torch.cuda.device_count() and (fault := gpu_fault("cuda")):
            self.tell(f"there is a GPU, but it does not work ({fault}); the CPU is taken", True)
        forget_peak(self.device)
        self.started = monotonic()
        self.settings, self.record = self.config, self.records[""]
        self.snapshots: Snapshots = NO_SNAPSHOTS  # of the stage that is being made

    @property
    def accelerator(self) -> Accelerator:
        """The device in the run's precision, which a stage that asks for it declares."""
        return open_accelerator(self.settings.device, self.settings.precision, shared=True)

    @contextmanager
    def doing(self, name: str, reads: Sequence[str]) -> Iterator[Record]:
        """Gives a stage its settings and a record of its own."""
        before = self.settings, self.record
        self.settings, self.record = view(self.config, name, reads), Record()
        self.records[name], sent = self.record, processes.SENT.bytes
        try:
            yield self.record
        finally:
            self.record.sent_bytes = processes.SENT.bytes - sent
            self.settings, self.record = before

    @contextmanager
    def part(self, name: str, steps: int | None = None, *, plain_pass: float | None = None) -> Iterator[None]:
        """Announces a part of a stage and takes its time.

        `plain_pass` is how long the dense network takes for one pass over the part's images, in seconds.
        """
        record = self.record
        self.listener(StageStarted(name, steps))
        start, algebra_before = perf_counter(), ALGEBRA.seconds
        yield
        seconds, algebra = perf_counter() - start, ALGEBRA.seconds - algebra_before
        time = StageTime(
            stage=name,
            seconds=seconds,
            algebra_seconds=algebra,
            passes=(seconds - algebra) / plain_pass if plain_pass else None,
            peak_memory_mib=peak_memory_mib(),
            peak_device_mib=peak_device_mib(self.device),
        )
        record.times.append(time)
        self.listener(StageEnded(name, seconds))

    def say(self, text: str, warning: bool = False) -> None:  # noqa: FBT001, FBT002 (read at the call)
        """A sentence that belongs into the report as well."""
        self.record.notes.append(text)
        self.tell(text, warning)

    def tell(self, text: str, warning: bool = False) -> None:  # noqa: FBT001, FBT002 (read at the call)
        """A sentence about how the run goes, for whoever watches."""
        self.listener(Note(text, warning))

    def continues_after(self, kept: Sequence[tuple[Record, str | None]]) -> bool:
        """Tells which parts are kept from before, or were taken over from another run of that name."""
        told = False
        for source in dict.fromkeys(source for _, source in kept):
            times = (time for record, of_one in kept if of_one == source for time in record.times)
            if parts := ", ".join(dict.fromkeys(time.stage for time in times)):
                before = f"continues after: {parts} (kept from before)"
                self.tell(f"taken over from {source}: {parts}; what follows is made anew" if source else before)
                told = True
        return told

    def say_replaced(self, name: str, replaced: Replaced) -> None:
        """Names the images that could not be read: the first in a sentence, all in the run's record."""
        names = [name for of_one in processes.of_all(replaced.names) for name in of_one]
        if told := Replaced(replaced.images, names).told(name):
            self.say(told, True)
            self.record.decisions[f"replaced images ({name})"] = names

    def say_waited(self, stage: str, waited: float) -> None:
        """Tells where loading images took much of a stage that has just ended."""
        share, seconds = waited / max(self.record.times[-1].seconds, 1e-9), self.record.times[-1].seconds
        if share > WAITED and seconds > LONG:
            told = f"{stage}: {100 * share:.0f} % of the time was spent waiting for images"
            self.tell(f"{told}; more --workers may help (now {self.config.loaders})", True)

    def remember(self, training: str, history: Sequence[dict[str, float]]) -> None:
        """Takes down the course of a training, step by step."""
        rows = [{name: value if isfinite(value) else None for name, value in row.items()} for row in history]
        self.record.history[training] = rows

    def told(self) -> Record:
        """Everything that was told so far, in the order of the stages."""
        total = Record()
        for record in self.records.values():
            total.times += record.times
            total.notes += record.notes
            total.history |= record.history
            total.decisions |= record.decisions
        return total


def view(config: RunConfig, stage: str, names: Sequence[str]) -> RunConfig:
    """The configuration as a stage may read it: a setting that it does not declare is a mistake of ours."""
    return config if names == ALL else cast(RunConfig, _View(config, stage, {*names, *FREE, "loaders"}))


class _View:
    def __init__(self, config: RunConfig, stage: str, names: set[str]) -> None:
        self._config, self._stage, self._names = config, stage, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AssertionError(f"stage {self._stage!r} reads {name} and does not declare it")
        return getattr(self._config, name)

    def model_copy(self, *, update: dict[str, Any]) -> "_View":
        return _View(self._config.model_copy(update=update), self._stage, self._names | update.keys())
