"""The signals that end a command: each unwinds it as Ctrl-C does, and none is lost where a library swallows it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kcrprune import processes
from kcrprune.cli.streams import Unheard

ENDING: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

_received: list[int] = []  # of the command that runs; more than one where the first was not heeded


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, KeyboardInterrupt comes with each of these signals, but for those that the process was told to ignore.

    `nohup` does so with SIGHUP, a shell with SIGINT for what runs in its background.
    """
    _received.clear()
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    mine = {number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    if threading.current_thread() is not threading.main_thread():
        mine.clear()  # Python hands signals to the main thread alone
    for number in mine:
        signal.signal(number, _take)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])
        # CPython remembers an interrupt that left an `exec`, caught or not, and under `python -m` ends by SIGINT for it
        exec("")


def received() -> bool:
    """Whether a signal came that ends this command."""
    return bool(_received)


def told() -> int:
    """Says which signal ended the command; returns 128 and its number, as shells report it."""
    number = _received[0] if _received else signal.SIGINT
    if processes.may_tell_failure():
        Unheard(sys.stderr).write(f"stopped by {signal.Signals(number).name}\n")
    return 128 + number


def raise_again() -> None:
    """KeyboardInterrupt where a signal came, and what it raised went no further than an `except` of some library."""
    if _received:
        raise KeyboardInterrupt


def _take(number: int, _frame: object) -> None:
    _received.append(number)
    raise KeyboardInterrupt
