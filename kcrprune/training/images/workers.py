"""What becomes of the processes that load images, in a sentence with the way out."""

import re
from typing import Final

from kcrprune.errors import KcrPruneError, ran_out_of_memory

ENDS: Final = (  # what torch says, and what that means
    (
        r"[Bb]us error|shared memory|/torch_",
        "the processes that load images need more shared memory than /dev/shm has; give --workers 0 or a smaller "
        "--batch-size, or enlarge it (docker run --shm-size 2g)",
    ),
    (
        r"[Tt]oo many open files|ancdata|file descriptor",
        "the processes that load images need more open files than are allowed; give --workers 0, or raise ulimit -n",
    ),
    (
        r"worker.*(killed|exited unexpectedly)",
        "a process that loads images was killed, as happens where memory or shared memory (/dev/shm) runs out; give "
        "fewer --workers, --workers 0 or a smaller --batch-size",
    ),
    (
        r"\[Errno (11|12|35)\]|[Rr]esource temporarily unavailable",
        "no more processes that load images can be started here; give --workers 0",
    ),
)


def told(error: BaseException, workers: int) -> KcrPruneError | None:
    """The error for one that came out of `workers` processes; None for what needs no other words."""
    if workers == 0:
        return None
    text = str(error).strip()
    for pattern, sentence in ENDS:
        if re.search(pattern, text, re.DOTALL):
            return KcrPruneError(f"{sentence} ({text.splitlines()[-1]})")
    if ran_out_of_memory(error):
        return KcrPruneError("memory ran out in a process that loads images; give fewer --workers, or --workers 0")
    return None
