"""Snapshots of a stage as folders of the run's store: the newest two, until the stage is whole.

Of several processes the first writes them; all go on from the same.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

from kcrprune import processes
from kcrprune.errors import KcrPruneError
from kcrprune.run.store import Codec, of_first, read_packed, write_packed

NEWEST: Final = 2
CODEC: Final = Codec[dict[str, Any]](dict[str, Any])


@dataclass
class FolderSnapshots:
    """Those of one stage, numbered, below `folder`; one is due `seconds` after the last."""

    folder: Path
    seconds: float
    tell: Callable[[str, bool], None]
    written: float = field(default_factory=monotonic)

    def newest(self) -> dict[str, Any] | None:
        """The last whole one."""
        newest = processes.of_first(lambda: self._numbers()[-1:])
        if not newest:
            return None
        self.tell("goes on from a snapshot that was kept before", False)
        return CODEC.unpack(of_first(lambda: read_packed(self.folder / str(newest[0]))))

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keeps a state where one is due; a disk that is full costs a warning, and the one before stays."""
        if processes.rank() > 0 or monotonic() - self.written < self.seconds:
            return
        numbers = self._numbers()
        try:
            self.folder.mkdir(exist_ok=True)
            write_packed(self.folder / str(max(numbers, default=0) + 1), CODEC.pack(state()))
        except (KcrPruneError, OSError) as error:
            self.tell(f"no snapshot was kept: {error}", True)
        for number in numbers[: 1 - NEWEST]:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)
        self.written = monotonic()

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*"))
