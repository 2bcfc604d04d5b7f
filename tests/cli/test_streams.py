"""Logs and results that nobody reads, that have no room, or that cannot hold what is written."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kcrprune.cli import streams
from kcrprune.cli.app import run
from kcrprune.cli.progress import LiveProgress
from kcrprune.cli.streams import Output, Unheard, Unread
from kcrprune.errors import KcrPruneError
from kcrprune.events import Note, StageEnded, StageStarted, StepDone
from kcrprune.pipeline.compress import RunResult
from tests.cli.conftest import COMPARISON


class Broken(io.StringIO):
    """Takes the first `room` writes, then fails."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, error, room=0):
        super().__init__()
        self.error, self.room, self.tried = error, room, 0

    def write(self, text):
        self.tried += 1
        if self.tried > self.room:
            raise self.error
        return super().write(text)


FAULTS = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), OSError(5, "Input/output error")]


@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("fault", [*FAULTS, ValueError("I/O operation on closed file")], ids=str)
def test_a_log_that_takes_nothing_in_ends_no_run(pipeline, monkeypatch, capsys, fault, room):
    log = Broken(fault, room)
    monkeypatch.setattr(sys, "stderr", log)

    def told(*args, **kwargs):
        for event in (
            Note("hello"),
            StageStarted("search", 3),
            StepDone("search", 3, {"kc": 1.0}),
            StageEnded("search", 1),
        ):
            args[3](event)
        return RunResult(Path("run"), COMPARISON)

    monkeypatch.setattr(pipeline, "compress", told)
    assert run(["compress", "x"]) == 0
    assert log.tried > room
    assert capsys.readouterr().out.endswith("The run is in run\n")
    assert run(["compress"]) == 2, "nor does the error line"


def test_a_terminal_that_is_gone_ends_no_run():
    stream = Unheard(Broken(FAULTS[2]))  # type: ignore[arg-type]
    with LiveProgress(Console(file=stream, force_terminal=True)) as show:  # type: ignore[arg-type]
        for event in (StageStarted("search", 3), Note("x"), StageEnded("search", 1.0)):
            show(event)


@pytest.mark.parametrize(("fault", "code"), [(FAULTS[0], 141), (FAULTS[1], 1)])
@pytest.mark.parametrize("words", ["inspect x", "inspect x --json", "--help", "--version"])
def test_results_that_nobody_takes_end_as_those_of_usual_tools(pipeline, monkeypatch, capsys, fault, code, words):
    monkeypatch.setattr(sys, "stdout", Broken(fault))
    assert run(words.split()) == code
    told = capsys.readouterr().err
    assert told == "" if code == 141 else "No space left on device" in told
    assert told.count("\n") == (code == 1)


def test_names_that_are_not_utf_8_and_signs_that_an_encoding_lacks_are_written_as_numbers(pipeline, monkeypatch):
    folder = os.fsdecode(b"run\xff\xc3\x97")
    monkeypatch.setattr(pipeline, "compress", lambda *args, **kwargs: RunResult(Path(folder), COMPARISON))
    for encoding, sign in (("utf-8", "×"), ("ascii", r"\xd7")):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
        assert run(["compress", "x"]) == 0
        shown = printed.getvalue().decode(encoding)
        assert shown.endswith(f"The run is in run\\udcff{sign}\n")
        assert run(["compress", "x", "--json"]) == 0
        assert json.loads(printed.getvalue()[len(shown.encode(encoding)) :])["folder"] == folder


def test_streams_that_are_closed_from_the_start_are_no_files_that_come_later():
    code = "import sys, os; from kcrprune.cli import streams; streams.open_closed(); "
    code += "assert None not in (sys.stdin, sys.stdout, sys.stderr); os._exit(os.open(os.devnull, os.O_RDONLY))"
    closed = subprocess.run(f'exec "{sys.executable}" -c "{code}" <&- >&- 2>&-', shell=True, check=False)
    assert closed.returncode > 2


def test_an_output_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(streams, "abandon_output", lambda: None)
    with pytest.raises(KcrPruneError, match="standard output takes nothing in: No space left on device"):
        Output(Broken(FAULTS[1])).write("x")
    with pytest.raises(Unread):
        Output(Broken(FAULTS[0])).write("x")


class Unflushable(io.StringIO):
    """Takes text in and cannot send it on; it knows no encoding."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("fault", [*FAULTS, ValueError("I/O operation on closed file")], ids=str)
def test_what_cannot_be_sent_on_is_lost_of_a_log_and_told_of_a_result(monkeypatch, fault):
    monkeypatch.setattr(streams, "abandon_output", lambda: None)
    log = Unheard(Unflushable(fault))
    assert log.write("é\udcff") == 2
    log.flush()
    assert log.getvalue() == r"é\udcff"
    with pytest.raises(Unread if isinstance(fault, BrokenPipeError) else KcrPruneError):
        Output(Unflushable(fault)).flush()


def test_a_stream_that_is_closed_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert Unheard(stream).isatty()
    stream.close()
    assert not Unheard(stream).isatty()
