"""The figures of training steps while they come: lines of JSON that can be followed, and TensorBoard's files."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kcrprune.errors import ConfigError
from kcrprune.events import Event, Listener, Note, StepDone

LOG = "log.jsonl"  # of a finished run: each step once, in the order of the stages
BOARD = "tensorboard"


class Metrics:
    """Writes what steps tell below a folder, and hands every event on.

    A run that goes on from a snapshot tells the steps behind it twice, until its end writes the log whole. A full disk
    ends the writing with a warning, and not the run.
    """

    def __init__(self, folder: Path, listener: Listener, *, board: bool = False) -> None:
        self._folder, self._listener, self._board = folder, listener, board
        self._log: Any = None
        self._writer: Any = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._log, self._writer):
            if file is not None:
                file.close()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        if isinstance(event, StepDone) and event.values and not self._failed:
            try:
                self._write(event)
            except OSError as error:
                self._failed = True
                self._listener(Note(f"the steps' figures are no longer written ({error.strerror or error})", True))
        self._listener(event)

    def _write(self, step: StepDone) -> None:
        if self._log is None:
            self._log = (self._folder / LOG).open("a", encoding="utf-8", buffering=1)  # a line at a time
            self._writer = _writer(self._folder / BOARD) if self._board else None
        self._log.write(line(step.stage, {"step": step.step, **step.values}))
        if self._writer is not None:
            for name, value in step.values.items():
                self._writer.add_scalar(f"{step.stage}/{name}", value, step.step)


def line(stage: str, row: dict[str, Any]) -> str:
    """One step as a line of JSON."""
    return json.dumps({"stage": stage} | row) + "\n"


def require_board() -> None:
    """ConfigError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is asked for and not installed; pip install tensorboard, or leave it out")


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
