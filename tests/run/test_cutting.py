"""The stages from the ranking on by themselves: what they decide, say and refuse, with everything costly left out."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import CheckpointError, DataError, DivergedError, KcrPruneError
from kcrprune.events import Note
from kcrprune.measure.report import Accuracy, Timing
from kcrprune.measure.times import BranchTimes, TimeTable
from kcrprune.plan import ChannelPlan, Kept
from kcrprune.run import cutting, folder, measuring, ranking, saving, spending, store
from kcrprune.run.context import Context, Record
from kcrprune.run.cutting import Cut
from kcrprune.run.folder import ASKED, RELATIVES, STORE, Asked, relatives
from kcrprune.run.measuring import plain_pass
from kcrprune.run.pricing import Place
from kcrprune.run.ranking import Searched, by_group, by_site
from kcrprune.run.selecting import Selected
from kcrprune.run.snapshots import FolderSnapshots
from kcrprune.run.spending import Tried, _best, _corrected
from kcrprune.run.store import Codec, Key, Packed, Store
from kcrprune.training.parts import _size, told_of_few
from kcrprune.training.recover import Recovered

PLAN = ChannelPlan(architecture=None, groups=(Kept(site="m", axis="mlp_hidden", width=2, channels=((0,),)),))


@pytest.fixture
def told() -> list[Any]:
    return []


@pytest.fixture
def context(told: list[Any]) -> Context:
    return Context(Path("x.pth"), RunConfig(device="cpu"), told.append)


def cut_by(
    context: Context, monkeypatch: pytest.MonkeyPatch, distances: list[float], *, searched: bool = False, **weights: Any
) -> tuple[Any, list[Any]]:
    """The stage, where a cut network has these distances, one after the other; and what was refitted towards what."""
    fitted: list[Any] = []
    model = nn.Linear(2, 1)
    monkeypatch.setattr(cutting, "cut_", lambda model, plan: model)
    monkeypatch.setattr(cutting, "distance_of", lambda context, network: None)
    monkeypatch.setattr(cutting, "HeldOut", lambda *_: SimpleNamespace(loss=lambda model: distances.pop(0)))
    monkeypatch.setattr(cutting, "searched_network", lambda network, balanced, tightened, found: (model, found))
    monkeypatch.setattr(cutting, "refit", lambda *args: fitted.append(args))
    pool: Any = SimpleNamespace(parts=SimpleNamespace(held_out=[], calibration=[]))
    found = Searched(scores={}, weights=weights or None, steps=7)
    selected = Selected(plan=PLAN, searched=searched)
    return cutting.cut(context, None, pool, None, None, found, selected), fitted  # type: ignore[arg-type]


def test_a_cut_is_refitted_and_tells_its_distance_before_and_after(context: Context, monkeypatch):
    found, fitted = cut_by(context, monkeypatch, [0.5, 0.125])
    assert (found.uncorrected, found.distance, found.trained) == (0.5, 0.125, 0)
    assert fitted[0][-2:] == ("scores", context.snapshots)
    assert fitted[0][3] is None, "towards the balanced network, since the plan is the scores'"
    assert context.record.decisions["plans"] == {
        "ranking": "innovation",
        "before_refit": {"scores": 0.5},
        "held_out_distillation": {"scores": 0.125},
        "chosen": "scores",
    }


def test_a_plan_of_the_search_is_cut_out_of_what_the_search_left(context: Context, monkeypatch):
    found, fitted = cut_by(context, monkeypatch, [0.5, 0.125], searched=True, w=torch.ones(1))
    assert (found.trained, context.record.decisions["plans"]["chosen"]) == (7, "search")
    assert isinstance(fitted[0][3], Searched)
    frozen, _ = cut_by(context, monkeypatch, [0.5, 0.125], searched=True)
    assert frozen.trained == 0, "gates alone have learned"


def test_without_a_refit_the_cut_is_measured_once_and_no_number_ends_it(context: Context, monkeypatch):
    context.settings = context.config.model_copy(update={"refit": False})
    found, fitted = cut_by(context, monkeypatch, [0.25])
    assert (found.uncorrected, found.distance, fitted) == (None, 0.25, [])
    assert context.record.decisions["plans"]["before_refit"] == {}
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(
            DivergedError, match=r"cut by its scores answers what are no finite numbers; a higher --refit"
        ):
            cut_by(context, monkeypatch, [wrong])


@pytest.mark.parametrize(
    ("stopped", "kept", "said"),
    [
        (None, 5, []),
        (None, 0, [("recovery did not lower the held-out loss; the network before it was kept", False)]),
        ("step 3: no number", 2, [("step 3: no number; the best network from before was kept", True)]),
    ],
)
def test_a_recovery_says_which_weights_were_kept_where_not_the_last_or_best(context, told, stopped, kept, said):
    cutting._remember(context, Recovered(0.5, 0.25, kept, [{"loss": 1.0}], stopped))
    assert told == [Note(text, warning) for text, warning in said]
    assert context.record.notes == [text for text, _ in said]
    assert context.record.history == {"recover": [{"loss": 1.0}]}
    assert context.record.decisions["recover"] == {"held_out_before": 0.5, "held_out_after": 0.25, "kept_step": kept}


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (None, []),
        (Accuracy(images=1, top1=0.12345), ["top-1 12.35 %"]),
        (Accuracy(images=1, distance=0.0123456), ["relative squared distance 0.01235"]),
    ],
)
def test_what_the_cut_took_is_said_before_the_recovery(context: Context, monkeypatch, accuracy: Any, said: list[str]):
    def begin(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(cutting, "accuracy_on", lambda *_: accuracy)
    monkeypatch.setattr(cutting, "back_at_once", begin)
    network: Any = SimpleNamespace(pruned=lambda plan, weights: nn.Linear(2, 1))
    pool: Any = SimpleNamespace(parts=SimpleNamespace(training=[0], calibration=[]))
    made = Cut(plan=PLAN, weights={}, distance=0.5)
    with pytest.raises(ZeroDivisionError):
        cutting.recover(context, network, pool, None, made)  # type: ignore[arg-type]
    assert context.record.notes == [f"after cut and refit, before recovery: {each}" for each in said]
    trained = made.model_copy(update={"trained": 60})
    assert cutting.recover(context, network, pool, None, trained) is None, "no step is left"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_latency": 0.7}, ["no search: its gates keep to MACs, and the target is a time"]),
        (
            {"recover_steps": 0},
            ["no search: it would take its steps out of those of the recovery, and recover_steps is 0"],
        ),
        ({"search_steps": 0}, []),
    ],
)
def test_why_nothing_is_searched_is_said_where_it_was_asked_for(context: Context, changes: Any, said: list[str]):
    context.settings = RunConfig(device="cpu", **changes)
    assert ranking.search(context, *[None] * 6) is None  # type: ignore[arg-type]
    assert context.record.notes == said


def test_scores_of_nothing_but_zeros_are_no_ranking(context: Context, monkeypatch):
    worth = [{("m", "heads"): torch.zeros(3)}, {("m", "heads"): torch.tensor([0.0, 1.0, 0.0])}]
    monkeypatch.setattr(ranking, "allowed", lambda *_: SimpleNamespace(opened=()))
    monkeypatch.setattr(ranking, "plain_pass", lambda *_: 1.0)
    monkeypatch.setattr(ranking, "back_at_once", lambda *_: None)
    monkeypatch.setattr(ranking, "add_gates_", lambda *_, **__: None)
    monkeypatch.setattr(ranking, "remove_gates_", lambda *_: None)
    monkeypatch.setattr(ranking, "_scores", lambda *_: worth.pop(0))
    context.settings = RunConfig(device="cpu", ranking="fisher")
    network: Any = SimpleNamespace(with_weights=lambda weights: nn.Linear(2, 2), groups=())
    pool: Any = SimpleNamespace(parts=SimpleNamespace(scoring=[torch.ones(3, 1), torch.ones(2, 1)]))
    with pytest.raises(CheckpointError, match=r"^every score is zero: on 5 images nothing that may be cut changes"):
        ranking.score(context, network, pool, None)
    found = ranking.score(context, network, pool, None)
    assert by_group(found.scores)["m", "heads"].tolist() == [0, 1, 0]
    assert [time.stage for time in context.record.times] == ["score", "score"]


def test_scores_go_into_their_kept_form_and_come_back():
    scores: Any = {("a", "heads"): 1, ("b", "mlp_hidden"): 2, ("a", "attn_value"): 3}
    assert by_site(scores) == {"a": {"heads": 1, "attn_value": 3}, "b": {"mlp_hidden": 2}}
    assert by_group(by_site(scores)) == scores


def test_a_pass_is_timed_once_a_run_by_its_second_call(context: Context, monkeypatch):
    ticks = iter((0.0, 100.0, 100.0, 102.0))
    monkeypatch.setattr(measuring, "perf_counter", lambda: next(ticks))
    network: Any = SimpleNamespace(dense=nn.Linear(2, 2))
    batches = [torch.ones(4, 2), torch.ones(2, 2)]
    assert plain_pass(context, network, batches) == pytest.approx(2.0 / 4 * 6)
    assert context.seconds_an_image == 0.5
    assert plain_pass(context, network, batches[:1]) == 2.0


def tried(share: float, ratio: float, width: float = 0.0) -> Tried:
    ends = {"ratio": ratio, "ratio_low": ratio - width, "ratio_high": ratio + width}
    timing = Timing(batch=1, runtime="x", threads=1, rounds=7, p50_ms=1, p90_ms=1, **ends)
    return Tried(share=share, plan=PLAN, timing=timing)


@pytest.mark.parametrize(
    ("ratio", "width", "keeps"), [(0.8, 0.0, True), (0.824, 0.0, True), (0.825, 0.0, False), (0.8, 0.025, False)]
)
def test_a_time_keeps_to_its_target_where_its_upper_end_is_within_three_percent(ratio, width, keeps):
    assert tried(0.7, ratio, width).keeps(0.8) == keeps
    assert str(tried(0.7, 0.8, 0.0125)) == "0.800 (0.788 to 0.812)"


def test_the_slowest_that_keeps_is_taken_else_the_fastest():
    a, b, c = tried(0.5, 0.6), tried(0.6, 0.79), tried(0.7, 0.95, 0.1)
    assert _best([a, b, c], 0.8) is b
    assert _best([c, tried(0.5, 0.99)], 0.8).ratio == 0.99
    assert _best([c, tried(0.5, 0.96)], 0.8).ratio == 0.96, "by its upper end"


def spendable(floor: float = 10.0) -> Any:
    return SimpleNamespace(target=0.8, allowed=SimpleNamespace(floor=lambda: floor, cost=SimpleNamespace(dense=100)))


@pytest.mark.parametrize(
    ("plans", "share"),
    [
        (
            [tried(0.8, 0.9)],
            1 - 0.2 * 0.2 / (1 - min(0.9 + 0.024, 0.9 - 0.012)),
        ),  # its end less half of what may be missed
        ([tried(0.8, 0.6)], 1 - 0.2 * 0.2 / 0.4),
        ([tried(0.8, 0.9), tried(0.6, 0.7)], 0.7),  # between
        ([tried(0.6, 0.7), tried(0.9, 0.99), tried(0.8, 0.9)], 0.7),
        ([tried(0.5, 0.999)], 0.1),  # never below the floor
        ([tried(0.99, 0.1)], 1 - 0.01 * 0.2 / 0.9),
        ([tried(0.99, 0.81)], 0.99 + 0.01 - 0.01 * 0.2 / 0.19),
    ],
)
def test_the_next_share_lies_between_or_in_proportion(plans: list[Tried], share: float):
    found = _corrected(spendable(), plans)
    assert found == pytest.approx(share)
    assert 0.1 <= found <= 0.999


@pytest.mark.parametrize(
    ("asked", "share", "words"),
    [
        (0.65, 0.65, "0.65"),
        ("5ms", 0.25, "5ms, which is 0.25 of 20 ms,"),
        ("12.5ms", 0.625, "12.5ms, which is 0.625 of 20 ms,"),
    ],
)
def test_a_target_in_time_is_a_share_of_the_tables(asked: Any, share: float, words: str):
    assert spending._share(asked, SimpleNamespace(dense_ms=20.0)) == (share, words)  # type: ignore[arg-type]


def test_a_place_is_its_machine_its_threads_its_batch_and_the_table_that_is_given():
    grid = BranchTimes(axes={"mlp_hidden": (1, 2)}, ms=(1.0, 2.0))
    table = TimeTable(machine="m", threads=2, batch=3, rounds=7, dense_ms=9.5, branches={"x": grid})
    places = [
        Place("m", 2, 3, None),
        Place("m", 2, 3, table),
        Place("m", 2, 4, table),
        Place("n", 2, 3, table),
        Place("m", 1, 3, table),
    ]
    assert [place.is_here for place in places] == [True, True, False, False, False]
    assert len({place.fingerprint for place in places}) == 5
    changed = table.model_copy(update={"dense_ms": 9.0})
    assert Place("m", 2, 3, changed).fingerprint != places[1].fingerprint


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("CUDA out of memory"), ZeroDivisionError("x")])
def test_where_memory_runs_out_a_network_is_not_timed_and_any_other_error_is_one(
    context: Context, told, monkeypatch, error
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(saving, "speed_of", fail)
    network: Any = SimpleNamespace(cost=SimpleNamespace(predicted=lambda plan: 1, dense=2), dense=None, inputs=None)
    cut: Any = SimpleNamespace(plan=PLAN)
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            saving._speed(context, network, None, cut, nn.Identity())
        return
    assert saving._speed(context, network, None, cut, nn.Identity()) is None
    assert told == [
        Note(f"timing both networks, about {saving.SECONDS:g} seconds"),
        Note("memory ran out, so the networks are not timed", True),
    ]
    assert context.record.notes == []


def test_a_result_that_the_library_cannot_write_is_one_sentence(tmp_path: Path, monkeypatch):
    def full(*_: Any) -> None:
        raise SafetensorError("no room")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(KcrPruneError, match=r"^cannot write .*score-1: no room$"):
        Store(tmp_path).keep(Key("score", "1"), Packed({"x": torch.ones(1)}, None), Record())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["data.json", "tensors.safetensors", "record.json"])
def test_a_result_without_one_of_its_files_is_none(tmp_path: Path, missing: str):
    kept, key = Store(tmp_path), Key("score", "1")
    kept.keep(key, Codec(float).pack(0.5), Record())
    assert kept.has(key)
    (tmp_path / "score-1" / missing).unlink()
    assert not kept.has(key)


def test_tensors_of_a_result_are_named_by_where_they_stand_and_the_first_that_is_no_number_is_told():
    packed = Codec(dict[str, Any]).pack({"a": [torch.ones(1), {"b": torch.tensor([torch.inf])}], "c": (1, "x")})
    assert set(packed.tensors) == {"/a/0", "/a/1/b"}
    assert packed.not_finite == "a/1/b"
    assert packed.data == {"a": [{"$tensor": "/a/0"}, {"b": {"$tensor": "/a/1/b"}}], "c": [1, "x"]}
    assert Codec(float).pack(0.5).not_finite is None
    assert json.loads(json.dumps(packed.data)) == packed.data


def test_snapshots_of_one_stage_or_of_all_are_dropped(tmp_path: Path):
    kept = Store(tmp_path)
    keys = Key("search", "1"), Key("recover", "2")
    for key in keys:
        FolderSnapshots(kept.snapshots(key), 0.0, lambda *_: None).offer(lambda: {"step": 1})
    (tmp_path / "search-1").mkdir()
    kept.drop_snapshots(keys[0])
    assert {path.name for path in tmp_path.iterdir()} == {"search-1", "recover-2.snapshots"}
    kept.drop_snapshots()
    assert {path.name for path in tmp_path.iterdir()} == {"search-1"}


def test_stages_are_taken_over_from_the_newest_runs_alone(tmp_path: Path):
    asked = Asked.of("checkpoint", "images", RunConfig())
    for number in range(RELATIVES + 3):
        run = tmp_path / f"run{number:02}"
        (run / STORE).mkdir(parents=True)
        (run / STORE / ASKED).write_text(asked.model_dump_json())
        os.utime(run / STORE / ASKED, (number, number))
    found = relatives(tmp_path / "new", asked)
    assert [path.parent.name for path in found] == [f"run{number:02}" for number in range(RELATIVES + 2, 2, -1)]
    assert folder.relatives(tmp_path / "absent" / "new", asked) == {}


@pytest.mark.parametrize(
    ("images", "batch", "count", "size"), [(20, 8, 1, 8), (5, 8, 1, 5), (8, 8, 8, 8), (0, 8, 1, None), (20, 4, 5, None)]
)
def test_a_batch_is_no_larger_than_its_part_and_has_an_image_for_each_process(monkeypatch, images, batch, count, size):
    monkeypatch.setattr(processes, "count", lambda: count)
    config, dataset = RunConfig(batch_size=batch), range(images)
    if size is not None:
        assert _size(dataset, config) == size  # type: ignore[arg-type]
        return
    sentence = "too few images" if images == 0 else "5 processes cannot share batches of 4 images: start fewer, or give"
    with pytest.raises(DataError, match=sentence):
        _size(dataset, config)  # type: ignore[arg-type]


def test_images_that_did_not_suffice_are_told_setting_by_setting():
    parts: Any = SimpleNamespace(calibration=[torch.ones(4), torch.ones(3)], scoring=[torch.ones(2)])
    config = RunConfig(calibration_images=1024, score_images=2)
    assert list(told_of_few(parts, config)) == ["calibration_images: 1,024 are asked for, and there are 7"]
    assert list(told_of_few(parts, config.model_copy(update={"calibration_images": 7}))) == []
