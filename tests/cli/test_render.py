import io
import json
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from kcrprune.cli import progress
from kcrprune.cli.app import run
from kcrprune.cli.progress import LiveProgress, PlainProgress, QuietProgress
from kcrprune.events import Note, StageEnded, StageStarted, StepDone
from kcrprune.graphs import ExportResult
from kcrprune.measure.report import Comparison, Inspection, ModelReport
from tests.cli.conftest import COMPARISON, DENSE, EXPORTED, INSPECTION, PRUNED

COMMANDS = ("compress a", "report a b", "export a", "evaluate a", "inspect a", "demo", "compress --help", "nonsense")


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("variable", ["GITHUB_ACTIONS", "PY_COLORS", "CI"])
def test_pipes_get_no_escape_codes(pipeline, capsys, monkeypatch, words, variable):
    monkeypatch.setenv(variable, "true")
    run(words.split())
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("report a b --format json", tuple[ModelReport, ...], (DENSE, PRUNED)),
        ("report a --format json", tuple[ModelReport, ...], (DENSE,)),
        ("export a --json", ExportResult, EXPORTED),
        ("inspect a --json", Inspection, INSPECTION),
    ],
)
def test_json_is_the_whole_result(pipeline, capsys, words, kind, expected):
    assert run(words.split()) == 0
    assert TypeAdapter(kind).validate_json(capsys.readouterr().out) == expected


def test_the_json_of_a_run_holds_its_folder_and_its_comparison(pipeline, capsys):
    assert run(["compress", "a", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == "run"
    assert Comparison.model_validate(result["comparison"]) == COMPARISON


def test_tables_in_a_pipe_are_not_cut_to_a_width(pipeline, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert run(["report", "a", "b"]) == 0
    [macs] = [line.split() for line in capsys.readouterr().out.splitlines() if "MACs of one" in line]
    assert macs[-6:] == ["1.00", "M", "699.00", "k", "x", "0.699"]


def test_markdown_is_the_document_of_the_report(pipeline, capsys):
    assert run(["report", "a", "b", "--format", "markdown"]) == 0
    assert "| parameters | 33.00 k | 33.00 k | x 1.000 |" in capsys.readouterr().out


def test_compress_shows_the_stages_and_the_folder(pipeline, capsys):
    assert run(["compress", "a"]) == 0
    shown = capsys.readouterr().out
    assert "search" in shown
    assert "12.5 s" in shown
    assert shown.endswith("The run is in run\n")


def test_a_port_says_how_it_is_opened(pipeline, capsys):
    assert run(["export", "a", "--format", "pt2", "--out", "m.pt2", "--num-heads", "3"]) == 0
    assert (pipeline.asked["form"], pipeline.asked["out"]) == ("pt2", Path("m.pt2"))
    assert pipeline.asked["config"].num_heads == 3
    assert capsys.readouterr().out == "m.pt2: 90.00 kB, for torch.export.load(path).module()\n"
    assert run(["export", "a", "--format", "timm", "--onnx", "m.onnx"]) == 2
    assert "--onnx names an ONNX file" in capsys.readouterr().err


def test_inspect_shows_how_it_knows_and_what_the_pickle_named(pipeline, capsys):
    assert run(["inspect", "a"]) == 0
    shown = capsys.readouterr().out
    assert "depth 2: there are two blocks" in shown
    assert "argparse.Namespace" in shown


def test_evaluate_is_one_line(pipeline, capsys):
    assert run(["evaluate", "a"]) == 0
    assert capsys.readouterr().out == "top-1 84.65 %, top-5 99.00 %, loss 0.5 on 1,000 images\n"


def test_export_says_how_near_it_is(pipeline, capsys):
    assert run(["export", "a"]) == 0
    assert "at batch sizes 1, 2, 5: largest difference 1.0e-06, allowed 1.0e-04" in capsys.readouterr().out


EVENTS = (
    Note("2,048 images are generated", warning=True),
    StageStarted("search", 30),
    *(StepDone("search", step, {"task": 1 / step, "expected_macs": 0.7}) for step in range(1, 31)),
    StageEnded("search", 75.0),
    StageStarted("save"),
    StageEnded("save", 0.25),
)


def shown(make, pause=0.0, **console):
    stream = io.StringIO()
    with make(Console(file=stream, width=100, **console)) as listener:
        for event in EVENTS:
            listener(event)
            time.sleep(pause if isinstance(event, StepDone) and event.step == 30 else 0)
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then_and_the_last_step(monkeypatch):
    ticks = count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))
    assert shown(partial(PlainProgress, seconds_between=10)).splitlines() == [
        "warning: 2,048 images are generated",
        "search, 30 steps ...",
        "  search, step 10 of 30, 20.0 s left: task 0.1, expected macs 0.7",
        "  search, step 20 of 30, 10.0 s left: task 0.05, expected macs 0.7",
        "  search, step 30 of 30: task 0.03333, expected macs 0.7",
        "search: done in 1 min 15 s",
        "save ...",
        "save: done in 0.2 s",
    ]


def test_a_terminal_gets_the_stage_its_figures_and_what_is_done():
    text = shown(LiveProgress, pause=0.3, force_terminal=True, color_system=None)
    assert "loading PyTorch" in text
    assert "warning: 2,048 images are generated" in text
    assert "30/30" in text
    assert "expected macs 0.7" in text
    assert "search  1 min 15 s" in text


def test_quiet_leaves_the_warnings():
    assert shown(QuietProgress) == "warning: 2,048 images are generated\n"
