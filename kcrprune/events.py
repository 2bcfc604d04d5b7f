"""What a running job tells whoever listens: lines, stages and steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kcrprune.printable import printable_lines


@dataclass(frozen=True)
class Note:
    """One line that the user should see; what a terminal would not show of it has an escape in its place."""

    text: str
    warning: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable_lines(self.text))


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; `steps` is its length, None where it is not known beforehand."""

    stage: str
    steps: int | None = None


@dataclass(frozen=True)
class StepDone:
    """Step `step` (from 1) of a stage is done; `values` are its losses and other figures by name."""

    stage: str
    step: int
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageEnded:
    """A stage ended after `seconds` of wall time."""

    stage: str
    seconds: float


Event = Note | StageStarted | StepDone | StageEnded
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing; the default listener."""
