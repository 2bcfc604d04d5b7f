"""Streams in files: the same figures as in memory, nothing left on the disk, and a sentence where that is full."""

import copy
import os
from pathlib import Path

import pytest
import torch

from kcrprune.errors import KcrPruneError
from kcrprune.families import groups_of
from kcrprune.surgery.kept import Keep, in_files, on
from kcrprune.surgery.narrow import cut_
from kcrprune.surgery.partial import input_of
from kcrprune.surgery.refit import memory_of_refit, refit_
from tests.tiny import Tiny, random_plan

CPU = torch.device("cpu")


class Counted:
    """Keeps in files, and counts the bytes that are there at once."""

    def __init__(self, keep: Keep) -> None:
        self.keep, self.alive, self.most = keep, [], 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = self.keep(tensor)
        self.alive = [storage for storage in self.alive if not storage.expired()]
        self.alive.append(torch.multiprocessing.reductions.StorageWeakRef(kept.untyped_storage()))
        kept_now = len(self.alive)
        self.most = max(self.most, kept_now)
        return kept


def refitted(tiny: Tiny, keep: Keep) -> dict[str, torch.Tensor]:
    model = tiny.model()
    plan = random_plan(model, "tiny", 1)
    batches = [tiny.images(4, seed) for seed in range(2)]
    return refit_(cut_(copy.deepcopy(model), plan), model, groups_of(model), plan, batches, keep=keep).state_dict()


def test_a_refit_over_files_is_the_one_in_memory(tiny: Tiny, tmp_path: Path):
    in_memory, over_files = refitted(tiny, on(CPU)), refitted(tiny, in_files(tmp_path))
    assert all(torch.equal(over_files[name], tensor) for name, tensor in in_memory.items())
    assert not list(tmp_path.iterdir())


def test_the_streams_of_a_vit_are_as_many_as_is_estimated(tiny_vit: Tiny):
    model, keep = tiny_vit.model(), Counted(on(CPU))
    images = [tiny_vit.images(4, seed) for seed in range(2)]
    refitted(tiny_vit, lambda tensor: keep(tensor.clone()))
    stream = input_of(model, "blocks.0", images[0]).nbytes
    assert keep.most * stream == pytest.approx(memory_of_refit(model, groups_of(model), images), rel=0.2)


def test_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        KcrPruneError, match=r"neither the memory nor this disk \(No space left on device\); give fewer"
    ):
        in_files(tmp_path)(torch.ones(3))
    assert not list(tmp_path.iterdir())
