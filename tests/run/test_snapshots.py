from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kcrprune.run.snapshots import FolderSnapshots


@pytest.fixture
def told() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def snapshots(tmp_path: Path, told: list[tuple[str, bool]]) -> Callable[..., FolderSnapshots]:
    return lambda seconds=0.0: FolderSnapshots(
        tmp_path / "stage.snapshots", seconds, lambda text, warning: told.append((text, warning))
    )


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": {"a": torch.full((2,), float(step))}, "history": [{"loss": 0.1}], "none": None}


def test_the_newest_two_are_kept_and_the_last_is_given_back(snapshots, told, tmp_path):
    kept = snapshots()
    assert kept.newest() is None
    for step in range(1, 5):
        kept.offer(lambda step=step: state(step))
    assert {path.name for path in (tmp_path / "stage.snapshots").iterdir()} == {"3", "4"}
    found = snapshots().newest()
    assert found["weights"]["a"].tolist() == [4, 4]
    assert {**found, "weights": None} == {**state(4), "weights": None}
    assert told == [("goes on from a snapshot that was kept before", False)]


def test_a_state_is_asked_for_when_one_is_due_alone(snapshots, tmp_path):
    kept = snapshots(seconds=1000.0)
    kept.offer(lambda: pytest.fail("nothing is due"))
    kept.written -= 1001
    kept.offer(lambda: state(1))
    kept.offer(lambda: pytest.fail("nothing is due again"))
    assert (tmp_path / "stage.snapshots" / "1").is_dir()


def test_a_full_disk_costs_a_warning_and_no_older_snapshot(snapshots, told, monkeypatch):
    kept = snapshots()
    kept.offer(lambda: state(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kcrprune.run.store.save_file", full)
    kept.offer(lambda: state(2))
    [(text, warning)] = told
    assert warning
    assert text.startswith("no snapshot was kept: cannot write ")
    assert text.endswith("No space left on device")
    assert kept.newest()["step"] == 1


def test_what_was_being_written_is_no_snapshot(snapshots, tmp_path):
    kept = snapshots()
    kept.offer(lambda: state(1))
    (tmp_path / "stage.snapshots" / ".2.abcd.part").mkdir()
    assert kept.newest()["step"] == 1
