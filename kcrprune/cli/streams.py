"""Standard output and error as they may be met: closed, full, read by nobody, or too narrow for what is written."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from kcrprune.errors import KcrPruneError


class Unread(Exception):  # noqa: N818 (no fault)
    """Whoever read standard output has closed it."""


class Unheard:
    """A text stream for progress: what nobody takes in is lost, so that a log that is full or closed ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes what can be written; what the encoding lacks (names that are not UTF-8) as its number."""
        try:
            self._stream.write(self._writable(text))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Sends on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _writable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _failed(self, error: Exception) -> None:
        pass


class Output(Unheard):
    """A text stream for results, which somebody asked for: Unread where he has gone, KcrPruneError where it is full."""

    def _failed(self, error: Exception) -> None:
        abandon_output()
        if isinstance(error, BrokenPipeError):
            raise Unread from error
        raise KcrPruneError(f"standard output takes nothing in: {getattr(error, 'strerror', error)}") from error


def open_closed() -> None:
    """Gives each of the three streams that the process began without (`>&-`) one that leads nowhere.

    Else the next file to be opened would take its number, and what libraries print would land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def abandon_output() -> None:
    """Nothing more goes to standard output, what is still buffered neither."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
