"""A small part of the fuzzing of command lines; `python -m tests.cli.fuzz` is the whole."""

import signal
from pathlib import Path

import pytest

from kcrprune.cli.app import run
from tests.cli import fuzz

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other libraries' to developers, as in the program
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the alarm is POSIX"),
]


def test_random_command_lines_end_well():
    """In a process of their own: a library that is stopped half way would not be itself for the tests after it."""
    found = list(fuzz.supervised(range(30), seed=1, seconds=0.2))
    assert [outcome for outcome in found if outcome.fault is not None] == []
    assert len({outcome.code for outcome in found}) > 4  # they reach further than the first check


def interrupted(words):
    raise KeyboardInterrupt


def untidy(words):
    Path("stray").write_text("")
    return run(["inspect", "missing"])


def careless(words):
    Path("mine").write_text("yours")
    return run(["inspect", "missing"])


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (interrupted, "exit code -1"),
        (lambda words: 77, "exit code 77"),
        (lambda words: run(["inspect", "x", "--img-size"]) and 3, None),
        (lambda words: 3, "not one sentence"),
        (untidy, "left ['stray']"),
        (careless, "changed ['mine']"),
    ],
)
def test_what_ends_badly_is_found(monkeypatch, tmp_path, bad, fault):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(fuzz, "run", bad)
    assert fuzz.run_case(0, 0, tmp_path).fault == fault
    assert not (tmp_path / "stray").exists()
