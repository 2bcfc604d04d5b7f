"""How far a stage of training is, by its steps or by the clock."""

from math import inf
from time import monotonic


class Pace:
    """Where a training of `steps` steps is in its course; it ends early where `until` (of the monotonic clock) comes.

    A training that the clock will end goes through its course, rates and temperatures, as fast as the clock does.
    """

    def __init__(self, steps: int, until: float = inf) -> None:
        self.steps, self.until = steps, until
        self.start_(0)

    def start_(self, done: int) -> None:
        """Begins behind some steps, now."""
        self.first, self.started = done, monotonic()
        self.move_(done)

    def move_(self, done: int) -> None:
        """Takes note that so many steps are done."""
        self.at: float = done
        if self.until < inf:
            left = self.until - self.started
            passed = (monotonic() - self.started) / left if left > 0 else 1
            self.at = min(self.steps, max(done, self.first + (self.steps - self.first) * passed))

    @property
    def ended(self) -> bool:
        """Whether no step is left to do, as of the last move."""
        return self.at >= self.steps
