"""What a stage is handed: its settings, its record, the clock, and the words for what goes on."""

import json
from contextlib import suppress
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Note, StageEnded, StageStarted, StepDone
from kcrprune.measure.report import StageTime
from kcrprune.run import deadline, memory, metrics
from kcrprune.run.context import Context, Record
from kcrprune.run.deadline import pace_of, recovery_steps, say_early, search_steps
from kcrprune.run.lock import Owner
from kcrprune.run.metrics import Metrics, require_board
from kcrprune.run.saving import to_lines, write_json, write_text
from kcrprune.training.images.unreadable import Replaced

CPU = torch.device("cpu")


@pytest.fixture
def told() -> list[Any]:
    return []


@pytest.fixture
def context(told: list[Any]) -> Context:
    return Context(Path("x.pth"), RunConfig(device="cpu", workers=3), told.append)


def timed(stage: str, seconds: float = 1.0) -> StageTime:
    return StageTime(stage=stage, seconds=seconds)


def test_what_is_said_is_in_the_report_and_what_is_told_is_not(context: Context, told: list[Any]):
    context.say("both")
    context.say("beware", True)
    context.tell("only now")
    assert told == [Note("both"), Note("beware", True), Note("only now")]
    assert context.record.notes == ["both", "beware"]


def test_a_stage_has_a_record_and_settings_of_its_own_also_where_it_fails(context: Context):
    outside, everything = context.record, context.settings
    with suppress(ZeroDivisionError), context.doing("score", ("lr",)) as record:
        assert context.record is record is context.records["score"]
        assert context.settings.lr == everything.lr
        context.say("inside")
        raise ZeroDivisionError
    assert (context.record, context.settings) == (outside, everything)
    assert (outside.notes, context.records["score"].notes) == ([], ["inside"])


def test_a_part_is_timed_with_its_algebra_and_its_passes(context: Context, told: list[Any], monkeypatch):
    from kcrprune.run import context as module

    ticks = iter((10.0, 16.0))
    monkeypatch.setattr(module, "perf_counter", lambda: next(ticks))
    with context.part("order", 7, plain_pass=2.0):
        monkeypatch.setattr(module.ALGEBRA, "seconds", module.ALGEBRA.seconds + 1.0)
    (time,) = context.record.times
    assert (time.stage, time.seconds, time.algebra_seconds, time.passes) == ("order", 6.0, 1.0, 2.5)
    assert time.peak_device_mib is None
    assert (time.peak_memory_mib or 0) > 0
    assert told == [StageStarted("order", 7), StageEnded("order", 6.0)]


def test_everything_that_was_told_is_in_the_order_of_the_stages(context: Context):
    context.say("first")
    for name in ("b", "a"):
        with context.doing(name, ()):
            context.say(name)
            context.record.times.append(timed(name))
            context.record.decisions[name] = name
            context.remember(name, [{"loss": 1.0}])
    found = context.told()
    assert (found.notes, [time.stage for time in found.times]) == (["first", "b", "a"], ["b", "a"])
    assert list(found.decisions) == list(found.history) == ["b", "a"]
    assert context.record.notes == ["first"], "the records stay as they are"


def test_a_figure_that_is_no_number_is_remembered_as_none(context: Context):
    context.remember("search", [{"loss": float("nan"), "kc": 1.0}, {"loss": float("-inf")}, {"loss": 0.5}])
    assert context.record.history == {"search": [{"loss": None, "kc": 1.0}, {"loss": None}, {"loss": 0.5}]}
    context.remember("recover", [{"step": 1}])
    lines = to_lines(context.record.history)
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"stage": "search", "loss": None, "kc": 1.0},
        {"stage": "search", "loss": None},
        {"stage": "search", "loss": 0.5},
        {"stage": "recover", "step": 1},
    ]
    assert lines.endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "waited", "worth"),
    [(100.0, 21.0, True), (100.0, 20.0, False), (31.0, 31.0, True), (30.0, 30.0, False), (0.0, 0.0, False)],
)
def test_waiting_for_images_is_told_where_it_took_much_of_a_long_stage(
    context: Context, told: list[Any], seconds: float, waited: float, worth: bool
):
    context.record.times.append(timed("recover", seconds))
    context.say_waited("recover", waited)
    if worth:
        (note,) = told
        share = round(100 * waited / seconds)
        assert note.warning
        assert note.text == (
            f"recover: {share} % of the time was spent waiting for images; more --workers may help (now 3)"
        )
    assert bool(told) == worth
    assert context.record.notes == [], "a clock's word is in no report"


def test_images_that_were_replaced_are_named_in_a_sentence_and_all_in_the_record(context: Context, told: list[Any]):
    context.say_replaced("recover", Replaced(1000, []))
    assert told == []
    context.say_replaced("recover", Replaced(1000, ["a.png", "b.png"]))
    (note,) = told
    assert note.warning
    assert "a.png" in note.text
    assert context.record.decisions == {"replaced images (recover)": ["a.png", "b.png"]}
    assert context.record.notes == [note.text]


def test_what_is_kept_is_told_by_where_it_comes_from(context: Context, told: list[Any]):
    here = Record(times=[timed("order"), timed("score"), timed("order")])
    there = Record(times=[timed("balance")])
    assert context.continues_after(
        [(here, None), (there, "a (which differs in lr)"), (Record(times=[timed("cut")]), None)]
    )
    assert [note.text for note in told] == [
        "continues after: order, score, cut (kept from before)",
        "taken over from a (which differs in lr): balance; what follows is made anew",
    ]
    assert not context.continues_after([(Record(), None)])
    assert not context.continues_after([])
    assert len(told) == 2


def parts(gates: int, training: int) -> Any:
    return SimpleNamespace(gates=[0] * gates, training=[0] * training)


@pytest.mark.parametrize(
    ("changes", "recovering", "trained"),
    [({}, 60, 0), ({}, 44, 16), ({}, 0, 70), ({"epochs": 2}, 14, 0), ({"epochs": 2, "recover_steps": 0}, 0, 0)],
)
def test_a_recovery_has_its_steps_less_those_that_a_search_has_trained(changes: Any, recovering: int, trained: int):
    assert recovery_steps(RunConfig(**changes), parts(5, 7), trained) == recovering


@pytest.mark.parametrize(
    ("changes", "searching"),
    [
        ({"search_weight_lr": 0}, 16),
        ({"search_weight_lr": 0, "epochs": 3}, 15),
        ({}, 16),
        ({"epochs": 2}, 4),  # of the recovery's 14 the same part as 16 of 60
        ({"search_steps": 600, "epochs": 2}, 14),
    ],
)
def test_a_search_of_both_has_its_part_of_the_recoverys_steps(changes: Any, searching: int):
    assert search_steps(RunConfig(**changes), parts(5, 7)) == searching


def test_without_a_limit_steps_have_all_the_time(context: Context):
    found = pace_of(context, "recover", 7)
    assert (found.steps, found.until) == (7, inf)


def test_what_is_to_follow_keeps_the_time_that_its_like_has_taken(context: Context, monkeypatch):
    monkeypatch.setattr(deadline, "monotonic", lambda: 100.0)
    config = RunConfig(max_minutes=10, device="cpu")
    context.config, context.settings, context.started = config, config, 50.0
    context.records[""].times += [timed("load", 3), timed("measure dense", 4), timed("order", 20), timed("score", 30)]
    until = 50 + 600 - deadline.MARGIN - 7
    assert pace_of(context, "recover", 60).until == until
    left = until - 1.5 * 50 - 100
    assert pace_of(context, "search", 16).until == pytest.approx(100 + left * 16 / (16 + 60))
    context.settings = config.model_copy(update={"search_split": 0.7})  # a step of two: weights, then gates
    assert pace_of(context, "search", 16).until == pytest.approx(100 + left * 32 / (32 + 60))


@pytest.mark.parametrize(("done", "ended", "said"), [(5, True, True), (5, False, False), (7, True, False)])
def test_a_stage_that_the_clock_has_ended_says_how_far_it_came(context: Context, done: int, ended: bool, said: bool):
    pace: Any = SimpleNamespace(steps=7, ended=ended)
    say_early(context, "search", pace, done)
    sentence = "search: 5 of 7 steps were done in the time that max_minutes leaves for them"
    assert context.record.notes == ([sentence] if said else [])


@pytest.mark.parametrize(
    ("asked", "taken", "left"), [(None, 0, 0.75 * 4000), (1.0, 2**29, 2**29), (1.0, 2**31, 0.0), (2.0, 0, 2**31)]
)
def test_room_is_what_is_left_of_the_limit_or_three_quarters_of_what_is_free(
    monkeypatch, asked: Any, taken: int, left: Any
):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=taken))
    monkeypatch.setattr(memory, "free_memory", lambda device: 4000)
    limited: Any = SimpleNamespace(settings=SimpleNamespace(max_memory=asked))
    assert memory.room(limited, CPU) == left
    assert memory.room(limited, torch.device("cuda")) == 0.75 * 4000, "the limit is the machine's"


def test_streams_lie_on_the_device_else_in_memory_else_in_files(monkeypatch, tmp_path: Path):
    said: list[str] = []
    at: dict[str, float] = {"cuda": 10, "cpu": 20}
    monkeypatch.setattr(memory, "room", lambda context, device: at[device.type])
    monkeypatch.setattr(memory, "in_files", lambda folder: ("files", folder))
    monkeypatch.setattr(memory, "on", lambda device: ("on", device.type))
    place: Any = SimpleNamespace(device=torch.device("cuda"), folder=tmp_path, tell=said.append)
    assert memory.keep_streams(place, 10) == ("on", "cuda")
    assert memory.keep_streams(place, 20) is memory.pinned
    assert memory.keep_streams(place, 21) == ("files", tmp_path / "stages")
    place.device = CPU
    assert memory.keep_streams(place, 20) == ("on", "cpu")
    at["cpu"] = 0
    memory.keep_streams(place, 3 * 2**29)
    assert said[-1] == f"the streams of the refit take 1.5 GiB: they lie in files of {tmp_path}"
    assert len(said) == 2


@pytest.mark.parametrize("where", ["cuda", "feeds"])
def test_a_gpu_and_batches_of_others_are_asked_for_whole(where: str):
    there: Any = SimpleNamespace(device=torch.device("cuda" if where == "cuda" else "cpu"))
    batches: list[Any] = [torch.ones(4, 2)] if where == "cuda" else [object()]
    assert memory.back_at_once(there, "search", nn.Linear(2, 2), batches) is None


def test_figures_are_written_while_they_come_and_every_event_goes_on(tmp_path: Path, told: list[Any]):
    with Metrics(tmp_path, told.append) as listen:
        listen(Note("x"))
        assert not list(tmp_path.iterdir())
        listen(StepDone("load", 1))
        listen(StepDone("search", 1, {"loss": 0.5}))
        listen(StepDone("search", 2, {"loss": 0.25}))
        rows = [json.loads(line) for line in (tmp_path / metrics.LOG).read_text("utf-8").splitlines()]
    assert rows == [{"stage": "search", "step": 1, "loss": 0.5}, {"stage": "search", "step": 2, "loss": 0.25}]
    assert [type(event) for event in told] == [Note, StepDone, StepDone, StepDone]
    with Metrics(tmp_path, told.append) as listen:  # a run that goes on
        listen(StepDone("search", 2, {"loss": 0.25}))
    assert len((tmp_path / metrics.LOG).read_text("utf-8").splitlines()) == 3


def test_a_log_without_room_is_warned_of_once(tmp_path: Path, told: list[Any]):
    with Metrics(tmp_path / "absent", told.append) as listen:
        for step in (1, 2):
            listen(StepDone("search", step, {"loss": 0.5}))
    assert [event for event in told if isinstance(event, Note)] == [
        Note("the steps' figures are no longer written (No such file or directory)", True)
    ]
    assert len(told) == 3


def test_tensorboard_is_asked_for_before_anything_costs(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tensorboard is asked for and not installed; pip install tensorboard"):
        require_board()


def test_files_of_a_run_are_replaced_and_hold_names_that_are_no_utf_8(tmp_path: Path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "path": Path("é"), "name": "b\udcff"})
    assert (tmp_path / "x.json").read_text("utf-8") == ('{\n  "a": null,\n  "path": "é",\n  "name": "b\\udcff"\n}\n')
    assert json.loads((tmp_path / "x.json").read_text("utf-8"))["name"] == "b\udcff"
    write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("error", "alive"), [(psutil.NoSuchProcess(1), False), (psutil.AccessDenied(1), True), (None, True)]
)
def test_an_owner_whom_nobody_may_look_at_counts_as_alive(monkeypatch, error: Any, alive: bool):
    me = Owner.me()
    if error is not None:
        monkeypatch.setattr(psutil, "Process", lambda pid: (_ for _ in ()).throw(error))
    assert me.alive == alive
    assert me.model_copy(update={"host": "elsewhere"}).alive


@pytest.mark.parametrize(
    ("later", "status", "alive"), [(0.9, "running", True), (1.1, "running", False), (0, "zombie", False)]
)
def test_an_owner_is_known_by_when_it_began_and_a_dead_child_is_none(
    monkeypatch, later: float, status: str, alive: bool
):
    owner = Owner.me()
    process = SimpleNamespace(create_time=lambda: owner.started + later, status=lambda: status)
    monkeypatch.setattr(psutil, "Process", lambda pid: process)
    assert owner.alive == alive
