import io
import json
import os
import sys
import threading
import time
import warnings
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from kcrprune.cli import app, progress, render, signals
from kcrprune.cli.app import run
from kcrprune.cli.progress import LiveProgress, PlainProgress, QuietProgress
from kcrprune.events import Note, StageEnded, StageStarted, StepDone
from kcrprune.graphs import ExportResult
from kcrprune.measure.report import Comparison, Inspection, ModelReport, Network, Timing
from kcrprune.measure.summary import network_table
from kcrprune.measure.tables import markdown
from kcrprune.pipeline.compress import RunResult
from kcrprune.pipeline.verbs import Ported
from kcrprune.training.evaluate import Evaluation
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


@pytest.mark.parametrize(
    ("words", "into"),
    [
        ("export a --into d.pth", {"into": Path("d.pth"), "out": None, "keep_shapes": False}),
        ("export a --into d.pth --keep-shapes --out x", {"into": Path("d.pth"), "out": Path("x"), "keep_shapes": True}),
    ],
)
def test_a_file_gets_its_network_back_in_the_shapes_that_are_asked_for(pipeline, capsys, words, into):
    assert run(words.split()) == 0
    assert pipeline.asked == into
    assert capsys.readouterr().out == "d.pth: 90.00 kB, for the code of the file that it was made of\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export a --onnx m.onnx --out x", "--onnx names an ONNX file; where --format or --out is given, leave it out"),
        ("export a --onnx --format pt2", "--onnx names an ONNX file"),
        ("export a --into d.pth --format timm", "--into writes the file that it names anew; leave --format and --onnx"),
        ("export a --into d.pth --onnx", "--into writes the file that it names anew"),
        ("export a --keep-shapes", "--keep-shapes says how --into writes its file; give --into with it"),
        ("report a --provider cuda", "--provider, --batch and --threads say how times are measured; give --bench"),
        ("report a --batch 4", "give --bench with them"),
        ("inspect", "inspect takes a FILE, or --list in its place"),
    ],
)
def test_options_that_contradict_each_other_or_do_nothing_are_refused(pipeline, capsys, words, sentence):
    assert run(words.split()) == 2
    assert sentence in capsys.readouterr().err
    assert pipeline.asked == {}


@pytest.mark.parametrize(("words", "form"), [("--format timm", "timm"), ("-f pt2", "pt2")])
def test_a_ported_file_as_json_is_the_whole_result(pipeline, capsys, words, form):
    assert run(["export", "a", *words.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "m.pt2", "form": form, "bytes": 90_000}


TIMING = Timing(batch=1, runtime="x", threads=2, rounds=9, p50_ms=3, p90_ms=4, ratio=0.8, ratio_low=0.7, ratio_high=0.9)


def test_a_run_ends_with_its_time_where_that_was_measured_and_with_its_folder(capsys):
    render.run(RunResult(Path("there"), COMPARISON, TIMING))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "1 image in 0.80 of the dense time (0.70 to 0.90), with 0.699 of its MACs (x, 2 threads)"
    assert lines[-1] == "The run is in there"
    render.run(RunResult(Path("there"), COMPARISON, TIMING), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["speed"]["ratio"]) == ("there", 0.8)
    assert Comparison.model_validate(told["comparison"]) == COMPARISON


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (Evaluation(7, None, None, None, 0.5), "agreement 50.00 % on 7 images"),
        (Evaluation(7, 0.25, None, 1.23456, None), "top-1 25.00 %, loss 1.235 on 7 images"),
        (
            Evaluation(12_345, 0.0, 0.5, 0.0, 1.0),
            "top-1 0.00 %, top-5 50.00 %, agreement 100.00 %, loss 0 on 12,345 images",
        ),
    ],
)
def test_an_evaluation_is_a_line_of_what_was_measured(capsys, result, line):
    render.evaluation(result)
    assert capsys.readouterr().out == f"{line}\n"
    render.evaluation(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["images"] == result.images


NETWORKS = (Network(name="a", family="vit", transformer=True, axes=("heads",), floor=0.5),)


def test_networks_are_a_table_json_or_markdown(capsys):
    render.networks(NETWORKS, form="json")
    assert json.loads(capsys.readouterr().out) == [NETWORKS[0].model_dump(mode="json")]
    render.networks(NETWORKS, form="markdown")
    assert capsys.readouterr().out == f"{markdown(network_table(NETWORKS))}\n"
    render.networks(NETWORKS)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].strip() == "Networks of timm"
    assert [line.split() for line in shown if line.split()[:1] == ["a"]] == [["a", "heads", "0.500", "-"]]


def test_an_inspection_is_a_table_json_or_markdown(pipeline, capsys):
    shown = {}
    for form in ("table", "json", "markdown"):
        assert run(["inspect", "a", "-f", form]) == 0
        shown[form] = capsys.readouterr().out
    assert Inspection.model_validate_json(shown["json"]) == INSPECTION
    assert shown["markdown"].startswith("# vit.pth\n\n## What it is\n")
    assert shown["markdown"].endswith("nothing was imported.\n")
    assert "What it is" in shown["table"]
    assert "#" not in shown["table"]


def test_figures_that_json_has_no_word_for_are_null_and_signs_are_kept(capsys):
    render._json({"a": float("nan"), "b": [float("inf")], "c": "é\x1b", "path": Path("x")})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": [None], "c": "é\x1b", "path": "x"}
    assert "é" in printed
    assert r"\u001b" in printed


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, *, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


@pytest.mark.parametrize(("live", "quiet", "shows"), [(True, False, True), (False, False, True), (True, True, False)])
def test_progress_is_live_in_a_terminal_lines_elsewhere_and_warnings_alone_if_quiet(monkeypatch, live, quiet, shows):
    log = Terminal(live=live)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with render.progress(quiet=quiet) as listener:
        for event in (
            StageStarted("search"),
            Note("careful", warning=True),
            Note("by the way"),
            StageEnded("search", 1),
        ):
            listener(event)
    told = log.getvalue()
    assert "careful" in told
    assert ("by the way" in told) == shows
    assert ("\x1b" in told) == (live and not quiet)
    if live and not quiet:
        assert "\x1b[33mwarning: careful" in told, "in yellow"


def test_a_signal_that_was_swallowed_is_raised_at_the_next_event(monkeypatch):
    monkeypatch.setattr(signals, "_received", [15])
    with render.progress(quiet=True) as listener, pytest.raises(KeyboardInterrupt):
        listener(Note("x"))


def lines_of(events, monkeypatch, **options):
    ticks = count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))
    stream = io.StringIO()
    with PlainProgress(Console(file=stream, width=200), **options) as listener:
        for event in events:
            listener(event)
    return stream.getvalue().splitlines()


def test_a_stage_of_unknown_length_tells_its_steps_without_an_end(monkeypatch):
    events = (
        StageStarted("load"),
        StepDone("load", 1, {}),
        StepDone("load", 2, {"a_b": 2}),
        StepDone("load", 3, {"c": 3}),
    )
    assert lines_of(events, monkeypatch, seconds_between=2) == ["load ...", "  load, step 2: a b 2"]


def test_what_goes_on_from_a_snapshot_reckons_with_the_steps_since(monkeypatch):
    events = (StageStarted("recover", 100), *(StepDone("recover", step, {}) for step in (51, 52, 53)))
    assert lines_of(events, monkeypatch, seconds_between=2) == [
        "recover, 100 steps ...",
        "  recover, step 52 of 100, 48.0 s left",
    ]
    done = (StageStarted("recover", 2), StepDone("recover", 2, {}), StageStarted("next", 2), StepDone("next", 1, {}))
    assert lines_of(done, monkeypatch) == ["recover, 2 steps ...", "next, 2 steps ..."], "no figures, no news"


@pytest.mark.parametrize(
    ("total", "finished", "left", "steps", "rest"),
    [(None, False, None, "", ""), (30, False, 75.0, "3/30", "1 min 15 s left"), (30, True, 0.0, "3/30", "")],
)
def test_columns_of_a_bar_are_empty_where_nothing_is_known(total, finished, left, steps, rest):
    task = SimpleNamespace(total=total, completed=3, finished=finished, time_remaining=left)
    assert progress._Steps().render(task).plain == steps  # type: ignore[arg-type]
    assert progress._Left().render(task).plain == rest  # type: ignore[arg-type]


def test_the_last_figures_stand_beside_what_is_done_and_not_beside_the_next(monkeypatch):
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, width=100, force_terminal=True, color_system=None)) as show:
        for event in (
            *(StageStarted("a", 2), StepDone("a", 2, {"loss": 0.5}), StageEnded("a", 1.0)),
            *(StageStarted("b"), StageEnded("b", 2.0)),
        ):
            show(event)
    lines = [line.strip() for line in stream.getvalue().replace("\r", "\n").split("\n")]
    assert any(line.endswith("a  1.0 s  loss 0.5") for line in lines)
    assert any(line.endswith("b  2.0 s") for line in lines)


def test_a_command_line_sets_its_process_up_and_takes_nobodys_word_back(monkeypatch):
    asked = []
    monkeypatch.setattr(app, "run", lambda arguments: asked.append(list(arguments)) or 7)
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with warnings.catch_warnings():
        assert app.program(["report", "x"]) == 7
        warnings.warn("a library's notice", UserWarning, stacklevel=1)
    assert asked == [["report", "x"]]
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        app.program([])
        with pytest.raises(UserWarning, match="notice"):
            warnings.warn("a library's notice", UserWarning, stacklevel=1)


def test_signals_are_left_alone_outside_the_main_thread():
    import signal

    found = []

    def look():
        with signals.heeded():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("kind", ["pt2", "original", "timm"])
def test_each_form_says_how_it_is_opened(capsys, kind):
    render.ported(Ported(Path("x"), kind, 12))
    assert capsys.readouterr().out == f"x: 12 B, {render.OPENED_BY[kind]}\n"
