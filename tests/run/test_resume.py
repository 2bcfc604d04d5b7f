"""A run that is stopped and given again ends where one that is not stopped does, bit by bit."""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kcrprune import pipeline
from kcrprune.artifact.artifact import open_model
from kcrprune.errors import KcrPruneError, OutputExistsError
from kcrprune.events import Event, Note, StageEnded, StageStarted, StepDone, ignore
from kcrprune.plan import Preprocessing
from kcrprune.run import saving
from kcrprune.run.folder import RUNS, STORE
from kcrprune.training.images.sets import open_images
from kcrprune.training.images.source import Source
from kcrprune.training.parts import divide
from tests.pipeline.test_compress import SHORT, image_folder, save

PARTS = (
    *("load", "measure dense", "balance", "order", "score", "refit (to 0.89)", "search", "refit (search)"),
    *("refit (scores)", "measure cut", "recover", "measure pruned", "save"),
)
SAME = ("model.safetensors", "plan.json", "config.toml", "log.jsonl")


@pytest.fixture
def checkpoint(tiny_vit, tmp_path):
    return save(tiny_vit, tmp_path / "dense.safetensors")


class Watch(list):
    """Remembers what is told; stops the run when a part begins."""

    def __init__(self, stop_at=None, step=None):
        self.stop_at, self.step = stop_at, step

    def __call__(self, event):
        self.append(event)
        begins = isinstance(event, StageStarted) and self.step is None
        at_step = isinstance(event, StepDone) and event.step == self.step
        if (begins or at_step) and event.stage == self.stop_at:
            raise KeyboardInterrupt

    @property
    def parts(self):
        return [event.stage for event in self if isinstance(event, StageStarted) and event.stage != "evaluate"]

    @property
    def notes(self):
        return [event.text for event in self if isinstance(event, Note)]


def assert_same_run(folder: Path, other: Path):
    for name in SAME:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    reports = [json.loads((run / "report.json").read_text()) for run in (folder, other)]
    for report in reports:
        for side in ("before", "after"):
            report[side].pop("source")
        report["stages"] = [stage["stage"] for stage in report["stages"]]
    assert reports[0] == reports[1]
    decisions = [json.loads((run / "run.json").read_text())["decisions"] for run in (folder, other)]
    assert decisions[0] == decisions[1]


def test_a_run_that_is_stopped_at_each_of_its_parts_ends_as_one_that_is_not(checkpoint, tmp_path):
    images = str(image_folder(tmp_path / "images"))
    config = SHORT.model_copy(update={"data": images, "tighten_steps": 2, "search_weight_lr": 0.01, "search_steps": 2})
    whole = Watch()
    pipeline.compress(checkpoint, config, tmp_path / "apart" / "whole", whole)
    assert list(dict.fromkeys(whole.parts)) == list(PARTS)
    for number, part in enumerate(PARTS):
        told = Watch(stop_at=part)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(checkpoint, config, tmp_path / "run", told)
        assert told.parts[-1] == part
        assert len(told.parts) <= 5, "no stage is made twice"
        assert any(note.startswith("continues after: measure dense") for note in told.notes) == (number > 2)
        assert (tmp_path / "run").exists() == (number > 1), "what has kept nothing leaves nothing"
    last = Watch()
    pipeline.compress(checkpoint, config, tmp_path / "run", last)
    assert last.parts == ["load", "save"]
    assert_same_run(tmp_path / "run", tmp_path / "apart" / "whole")


def test_a_long_stage_goes_on_from_its_snapshot(checkpoint, finished, tmp_path):
    stops = (("search", 2), ("search", 3), ("refit (search)", 2), ("refit (scores)", 2), ("recover", 3))
    for stage, step in stops:
        told = Watch(stage, step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(checkpoint, SHORT, tmp_path / "run", told)
        goes_on = "goes on from a snapshot that was kept before" in told.notes
        assert goes_on == ((stage, step) != stops[0]), "each stops behind a snapshot of where the last was stopped"
    assert len(list((tmp_path / "run" / STORE).glob("recover-*.snapshots/*"))) == 2
    last = Watch()
    pipeline.compress(checkpoint, SHORT, tmp_path / "run", last)
    assert [event.step for event in last if isinstance(event, StepDone) and event.stage == "recover"] == [3]
    assert not list((tmp_path / "run" / STORE).glob("*.snapshots"))
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_process_goes_on_where_it_was(checkpoint, finished, tmp_path, kills):
    """At moments that are truly random, since every moment has to do; the long form kills at any stage."""
    (tmp_path / "mine.txt").write_text("mine")
    shutil.copytree(finished, tmp_path / "apart" / "earlier")
    before = tree(tmp_path, but="run")
    delays = [random.Random().uniform(0, 2.0 if kills == 2 else 0.5) for _ in range(kills)]
    for number, delay in enumerate(delays):
        kill_after(delay, checkpoint, tmp_path / "run", behind="measure dense" if number == 0 else "load")
        assert tree(tmp_path, but="run") == before
    told = Watch()
    pipeline.compress(checkpoint, SHORT, tmp_path / "run", told)
    assert any("continues after: measure dense" in note or "it is shown again" in note for note in told.notes), delays
    assert_same_run(tmp_path / "run", finished)
    assert not list((tmp_path / "run" / STORE).glob("lock.*"))


def kill_after(seconds: float, checkpoint: Path, out: Path, *, behind: str) -> None:
    """SIGKILL to a process of its own, so long after its run is `behind` a stage."""
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # spares it the import of torch
    start: Any = torch.multiprocessing.get_context("fork" if fork else "spawn")
    reached = start.Event()
    process = start.Process(target=run_until, args=(reached, behind, checkpoint, out))
    process.start()
    assert reached.wait(60)
    process.join(seconds)
    process.kill()
    process.join()


def run_until(reached: Any, behind: str, checkpoint: Path, out: Path) -> None:
    """Runs, and says when the stage is done."""

    def listen(event: Event) -> None:
        if isinstance(event, StageEnded) and event.stage == behind:
            reached.set()

    pipeline.compress(checkpoint, SHORT, out, listen)


def tree(folder: Path, *, but: str) -> dict[Path, bytes]:
    """What every file holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.relative_to(folder).parts[0] != but}


def test_a_changed_setting_makes_again_what_depends_on_it_and_says_so(checkpoint, tmp_path):
    changed = SHORT.model_copy(update={"lr": 1e-3})
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(checkpoint, SHORT, tmp_path / "run", Watch(stop_at="save"))
    told = Watch()
    pipeline.compress(checkpoint, changed, tmp_path / "run", told)
    assert told.parts == ["load", "measure cut", "recover", "measure pruned", "save"]
    assert "changed since the run was stopped: lr; what depends on it is made again" in told.notes
    pipeline.compress(checkpoint, changed, tmp_path / "apart" / "whole", ignore)
    assert_same_run(tmp_path / "run", tmp_path / "apart" / "whole")


def test_a_new_run_takes_over_what_another_one_beside_it_has_finished(checkpoint, finished, tmp_path):
    changed = SHORT.model_copy(update={"lr": 1e-3, "workers": 1})
    shutil.copytree(finished, tmp_path / "first")
    told = Watch()
    pipeline.compress(checkpoint, changed, tmp_path / "second", told)
    assert told.parts == ["load", "measure cut", "recover", "measure pruned", "save"]
    taken = "measure dense, balance, order, score, search, refit (search), refit (scores)"
    assert f"taken over from first (which differs in lr): {taken}; what follows is made anew" in told.notes
    anew = Watch()
    pipeline.compress(checkpoint, changed, tmp_path / "third", anew, fresh=True)
    assert anew.parts[:3] == ["load", "measure dense", "balance"]
    assert_same_run(tmp_path / "second", tmp_path / "third")


def test_a_finished_run_is_shown_again_and_fresh_begins_another(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = pipeline.compress(checkpoint, SHORT, None, ignore)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in (None, first.folder):
        told = Watch()
        again = pipeline.compress(checkpoint, SHORT.model_copy(update={"workers": 1}), out, told)
        assert again == first
        assert told.parts == ["load"]
        assert any("is finished and was asked the same" in note for note in told.notes)
    with pytest.raises(OutputExistsError, match="differs in lr"):
        pipeline.compress(checkpoint, SHORT.model_copy(update={"lr": 1.0}), first.folder, ignore)
    with pytest.raises(OutputExistsError, match="not empty"):
        pipeline.compress(checkpoint, SHORT, first.folder, ignore, fresh=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    fresh = pipeline.compress(checkpoint, SHORT, None, ignore, fresh=True)
    assert fresh.folder == RUNS / "dense-0.8-2"
    assert_same_run(fresh.folder, first.folder)


def test_other_images_under_the_same_name_are_other_images(checkpoint, tmp_path):
    images = image_folder(tmp_path / "images")
    config = SHORT.model_copy(update={"data": str(images), "search_steps": 0})
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(checkpoint, config, tmp_path / "run", Watch(stop_at="recover"))
    (images / "train" / "class0" / "0.png").rename(images / "train" / "class0" / "00.png")
    told = Watch()
    pipeline.compress(checkpoint, config, tmp_path / "run", told)
    assert told.parts[:2] == ["load", "measure dense"]
    assert any("changed since the run was stopped: the images" in note for note in told.notes)


def test_a_damaged_image_that_training_alone_meets_is_replaced_and_listed(checkpoint, tmp_path, monkeypatch):
    images, read = image_folder(tmp_path / "images"), Source.read
    config = SHORT.model_copy(update={"data": str(images), "search_steps": 0, "calibration_images": 8})
    config = config.model_copy(update={"recover_steps": 8})  # two epochs
    met = set()

    def watched(source, index):
        met.add(Path(source.place, source.items.files.names[index]))
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", watched)
        divide(open_images(config, Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), 5), config)
    damaged = next(path for path in sorted((images / "train").rglob("*.png")) if path not in met)
    damaged.write_bytes(damaged.read_bytes()[:-60])
    whole = pipeline.compress(checkpoint, config, tmp_path / "apart" / "whole", ignore)
    told = f"recover: 1 of 32 images cannot be read and others took their place: data/{damaged.relative_to(images)}"
    assert told in whole.comparison.notes
    decisions = json.loads((tmp_path / "apart" / "whole" / "run.json").read_text())["decisions"]
    assert decisions["replaced images (recover)"] == [str(damaged)]
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(checkpoint, config, tmp_path / "run", Watch(stop_at="measure pruned"))
    pipeline.compress(checkpoint, config, tmp_path / "run", ignore)
    assert_same_run(tmp_path / "run", tmp_path / "apart" / "whole")


def test_a_report_that_cannot_be_written_costs_nothing_that_is_finished(checkpoint, finished, tmp_path, monkeypatch):
    def full(path: Path, text: str):
        raise KcrPruneError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_text", full)
        with pytest.raises(KcrPruneError, match=r"plan\.json: No space left on device"):
            pipeline.compress(checkpoint, SHORT, tmp_path / "run", ignore)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    told = Watch()
    pipeline.compress(checkpoint, SHORT, tmp_path / "run", told)
    assert told.parts == ["load", "save"]
    assert_same_run(tmp_path / "run", finished)


def test_a_disk_without_room_for_the_network_is_told_of_before_anything_costs(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    told = Watch()
    with pytest.raises(
        KcrPruneError, match=r"run/model\.safetensors: it takes 0\.1 MB, and 0\.1 MB are free there; make"
    ):
        pipeline.compress(checkpoint, SHORT, tmp_path / "run", told)
    assert told.parts == ["load"]
    assert not (tmp_path / "run").exists()


def test_images_whose_names_are_not_utf_8_are_images(checkpoint, tmp_path):
    images = image_folder(tmp_path / os.fsdecode(b"\xff\xfe"), each=4)
    config = SHORT.model_copy(update={"data": str(images), "search_steps": 0, "recover_steps": 1})
    result = pipeline.compress(checkpoint, config, tmp_path / "run", ignore)
    assert os.fsdecode(b"\xff\xfe") in json.loads((result.folder / "run.json").read_text("utf-8"))["command"]
    assert open_model(result.folder).plan is not None
    assert pipeline.compress(checkpoint, config, tmp_path / "run", ignore) == result


def test_a_demo_that_is_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["kcrprune.pipeline.demo"], "EPOCHS", 1)  # the package has a verb of that name
    for stop_at, made in (("load", ["train the dense network", "load"]), ("measure dense", ["load", "measure dense"])):
        told = Watch(stop_at)
        with pytest.raises(KeyboardInterrupt):
            pipeline.demo(tmp_path / "demo", told)
        assert told.parts == made
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"digits", "dense.safetensors", STORE}


def test_streams_beyond_the_memory_lie_in_files_and_change_no_bit(checkpoint, finished, tmp_path):
    told = Watch()
    pipeline.compress(checkpoint, SHORT.model_copy(update={"max_memory": 1e-6}), tmp_path / "run", told)
    assert any(note.startswith("the streams of the refit take 0.0 GiB: they lie in files of") for note in told.notes)
    assert not list((tmp_path / "run" / STORE).glob("*.part"))
    ours, theirs = (open_model(run).model.state_dict() for run in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
