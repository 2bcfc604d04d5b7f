"""What a running job looks like: a live line in a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from kcrprune.events import Event, Note, StageEnded, StageStarted, StepDone
from kcrprune.measure.tables import duration, figure

SECONDS_BETWEEN_LINES = 30.0  # in a log, where every line stays


class PlainProgress:
    """Stages and notes as lines; of the steps, one line every half minute and the last."""

    def __init__(self, console: Console, *, seconds_between: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._seconds_between = seconds_between
        self._steps: int | None = None
        self._started = self._last_line = 0.0
        self._before: int | None = None  # steps that were done when the stage began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Note(text, warning):
                self._say(f"warning: {text}" if warning else text)
            case StageStarted(stage, steps):
                self._steps, self._before = steps, None
                self._started = self._last_line = time.monotonic()
                self._say(f"{stage} ..." if steps is None else f"{stage}, {steps} steps ...")
            case StepDone(stage, step, values):
                self._step(stage, step, values)
            case StageEnded(stage, seconds):
                self._say(f"{stage}: done in {duration(seconds)}")

    def _step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._before = step - 1 if self._before is None else self._before
        is_news = bool(values) and step == self._steps
        if not is_news and now - self._last_line < self._seconds_between:
            return
        self._last_line = now
        of = "" if self._steps is None else f" of {self._steps}"
        figures = f": {figures_line(values)}" if values else ""
        self._say(f"  {stage}, step {step}{of}{self._left(step, now)}{figures}")

    def _left(self, step: int, now: float) -> str:
        """The time that the rest will take at the rate so far."""
        if self._steps is None or self._before is None or step >= self._steps:
            return ""
        return f", {duration((self._steps - step) * (now - self._started) / (step - self._before))} left"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """The running stage with its bar and latest figures; what is done scrolls away above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = _Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Steps(),
            TimeElapsedColumn(),
            _Left(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        self._show("loading PyTorch and timm", None)  # seconds of silence otherwise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Note(text, warning):
                self._console.print(Text(f"warning: {text}", style="yellow") if warning else Text(text))
            case StageStarted(stage, steps):
                self._show(stage, steps)
            case StepDone(_, step, values):
                self._bars.figures = figures_line(values)
                if self._task is not None:
                    self._bars.update(self._task, completed=step)
            case StageEnded(stage, seconds):
                line = Text(f"{stage}  {duration(seconds)}", style="green")
                if self._bars.figures:
                    line.append(f"  {self._bars.figures}", style="dim")
                self._console.print(line)
                self._clear()

    def _show(self, stage: str, steps: int | None) -> None:
        self._clear()
        self._task = self._bars.add_task(stage, total=steps)

    def _clear(self) -> None:
        self._bars.figures = ""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


class QuietProgress(PlainProgress):
    """Warnings only."""

    def __call__(self, event: Event) -> None:
        """Shows a warning; everything else passes unseen."""
        if isinstance(event, Note) and event.warning:
            super().__call__(event)


class _Steps(ProgressColumn):
    """How many steps of how many; empty where a stage has no known length."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Left(ProgressColumn):
    """The time that the rest will take; empty where that is not known."""

    def render(self, task: Task) -> Text:
        left = None if task.finished else task.time_remaining
        return Text("" if left is None else f"{duration(left)} left")


class _Bars(Progress):
    """Rich's progress bars with a line of figures below."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(f"  {self.figures}", style="dim")


def figures_line(values: Mapping[str, float]) -> str:
    """The figures of a step on one line, four digits each."""
    return ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in values.items())
