import errno
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kcrprune import pipeline
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Note, StepDone, ignore
from kcrprune.measure.report import StageTime
from kcrprune.run import metrics
from kcrprune.run.context import Context
from kcrprune.run.metrics import Metrics
from tests.pipeline.test_compress import SHORT, save

STEPS = [StepDone("recover", step, {"task": 1 / step}) for step in (1, 2)]


def test_the_clock_ends_search_and_recovery_and_the_network_is_finished(tiny_vit, tmp_path):
    long = SHORT.model_copy(update={"max_minutes": 0.1, "search_steps": 10**6, "recover_steps": 10**6})
    start = time.monotonic()
    result = pipeline.compress(save(tiny_vit, tmp_path / "dense.safetensors"), long, tmp_path / "run", ignore)
    assert time.monotonic() - start < 60  # far from the steps that were asked for, whatever else the machine does
    early = [note for note in result.comparison.notes if "steps were done in the time that max_minutes leaves" in note]
    assert [note.split(":")[0] for note in early] == ["search", "recover"]
    assert (result.folder / "model.safetensors").exists()


@pytest.mark.parametrize(("waited", "seconds", "said"), [(30.0, 100.0, True), (10.0, 100.0, False), (9.0, 10.0, False)])
def test_waiting_for_images_is_told_of(tmp_path, waited, seconds, said):
    heard = []
    run = Context(tmp_path, RunConfig(), heard.append)
    run.record.times.append(StageTime(stage="recover", seconds=seconds))
    run.say_waited("recover", waited)
    told = "recover: 30 % of the time was spent waiting for images; more --workers may help (now 2)"
    assert heard == ([Note(told, warning=True)] if said else [])


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_reads_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, ignore, board=True) as told:
        for step in STEPS:
            told(step)
    board = EventAccumulator(str(tmp_path / metrics.BOARD)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("recover/task")] == [(1, 1.0), (2, 0.5)]


def test_what_is_not_installed_is_said_before_the_run(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    asked = SHORT.model_copy(update={"tensorboard": True})
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        pipeline.compress(save(tiny_vit, tmp_path / "dense.safetensors"), asked, tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path, monkeypatch):
    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    heard = []
    with Metrics(tmp_path, heard.append) as told:
        for step in STEPS:
            told(step)
    assert [replace(event, values={}) for event in heard if isinstance(event, StepDone)] == [
        replace(step, values={}) for step in STEPS
    ]
    assert [event.text for event in heard if isinstance(event, Note)] == [
        "the steps' figures are no longer written (No space left on device)"
    ]
