"""Who works in a folder: a file that names a process, and that counts for as long as this process lives.

Locks are numbered, and the highest counts. Whoever finds its owner dead makes the next number, which only one of
several processes can.
"""

import os
import socket
from pathlib import Path
from typing import Final, Self

import psutil
from pydantic import ValidationError

from kcrprune.atomic import write_atomically
from kcrprune.errors import OutputExistsError
from kcrprune.plan import Frozen

NAME: Final = "lock"


class Owner(Frozen):
    """A process, known apart from a later one of the same number by when it began."""

    pid: int
    started: float  # seconds since 1970
    host: str

    @classmethod
    def me(cls) -> Self:
        """This process."""
        return cls(pid=os.getpid(), started=psutil.Process().create_time(), host=socket.gethostname())

    @property
    def alive(self) -> bool:
        """Whether it still runs; on another host, for all that anybody can tell."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


def owner(folder: Path) -> Owner | None:
    """The living process that works in a folder."""
    try:
        found = Owner.model_validate_json(_locks(folder)[-1].read_bytes())
    except (IndexError, FileNotFoundError):  # never locked, or given up this moment
        return None
    except ValidationError:  # of another version, or damaged: it may live, for all that anybody can tell
        return Owner(pid=0, started=0, host="an unknown host")
    return found if found.alive else None


def take(folder: Path) -> Path | None:
    """Makes this process the owner and returns the lock, to be removed in the end; None where another one lives."""
    locks = _locks(folder)
    if owner(folder) is not None:
        return None
    mine = folder / f"{NAME}.{_number(locks[-1]) + 1 if locks else 1}"
    try:
        write_atomically(mine, lambda file: file.write_text(Owner.me().model_dump_json(), "utf-8"))
    except OutputExistsError:  # another process was faster
        return None
    for dead in locks:
        dead.unlink(missing_ok=True)
    return mine


def is_lock(name: str) -> bool:
    """Whether a file of that name may be a lock."""
    stem, _, number = name.partition(".")
    return stem == NAME and number.isdecimal()


def _locks(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob(f"{NAME}.*") if is_lock(path.name)), key=_number)


def _number(lock: Path) -> int:
    return int(lock.suffix[1:])
