"""How long algebra takes (decompositions, eliminations, solves), apart from the passes over images around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Seconds so far by a clock; on a GPU those until the host goes on."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock, self.seconds = clock, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time of the block; of the outermost, where blocks lie in each other."""
        start, before = self.clock(), self.seconds
        try:
            yield
        finally:
            self.seconds = before + self.clock() - start


ALGEBRA = Stopwatch()
