"""Batches by address: equal to the bit with any number of workers and from any first step."""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kcrprune.errors import DataError, KcrPruneError
from kcrprune.plan import Preprocessing
from kcrprune.training.images.batches import Batches, in_order
from kcrprune.training.images.transforms import training_transform

TRANSFORM = training_transform(Preprocessing(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3))


class Noisy(Dataset):
    """Augmented images whose labels tell their index, and which draw from every global generator."""

    def __init__(self, count: int = 13) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        noise = random.random() + np.random.random() + float(torch.rand(()))
        return TRANSFORM(Image.fromarray(pixels)) + noise, index


class Broken(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise DataError(f"image {index} is broken; remove it")


def batches(dataset: Dataset | None = None, *, size: int = 4, stage: str = "recover", workers: int = 0, seed: int = 0):
    return Batches(dataset or Noisy(), size, seed=seed, stage=stage, workers=workers)


def first(count: int, found: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(found, count))


def assert_equal_batches(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_batches_and_augmentations_are_equal_with_any_number_of_workers_and_from_any_step(workers, start):
    torch.manual_seed(workers)  # of no effect
    expected = first(8, batches().from_step(0))
    assert_equal_batches(first(8 - start, batches(workers=workers).from_step(start)), expected[start:])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 20), size=st.integers(1, 20), epoch=st.integers(0, 5))
def test_an_epoch_holds_no_image_twice_and_all_that_fill_a_batch(seed, count, size, epoch):
    size = min(size, count)
    drawn = batches(Noisy(count), size=size, seed=seed)
    labels = torch.cat([labels for _, labels in first(len(drawn), drawn.from_step(epoch * len(drawn)))])
    assert len(labels) == len(set(labels.tolist())) == count // size * size
    assert set(labels.tolist()) <= set(range(count))


def test_epochs_stages_and_seeds_differ_in_order_and_in_augmentation():
    def by_image(found: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[int], dict[int, Tensor]]:
        drawn = [(int(label), image) for images, labels in found for image, label in zip(images, labels, strict=True)]
        return [label for label, _ in drawn], dict(drawn)

    whole = batches(Noisy(12))
    runs = [by_image(whole), by_image(first(3, whole.from_step(3)))]
    runs += [by_image(batches(Noisy(12), stage="search")), by_image(batches(Noisy(12), seed=1))]
    for (order, images), (other, others) in itertools.combinations(runs, 2):
        assert order != other
        assert all(not torch.equal(images[label], others[label]) for label in range(12))


def test_iterating_gives_the_first_epoch():
    drawn = batches()
    assert len(drawn) == 3
    assert_equal_batches(list(drawn), first(3, drawn.from_step(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(workers):
    before = torch.get_rng_state(), random.getstate()
    first(2, batches(workers=workers).from_step(0))
    list(in_order(Noisy(0), 1, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_image_is_told_in_its_own_sentence(workers):
    with pytest.raises(DataError, match=r"^image \d is broken; remove it$"):
        first(1, batches(Broken(), size=2, workers=workers).from_step(0))


class Deadly(Broken):
    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.end()
        raise AssertionError("nothing ended")


def no_memory() -> None:
    raise MemoryError("of the process")


def full() -> None:
    raise RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "a process that loads images was killed, .*; give fewer --workers",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "/dev/shm.*--workers 0"),
        (full, r"more shared memory than /dev/shm has; .*docker run --shm-size 2g\)"),
        (lambda: os._exit(3), "was killed"),
        (no_memory, "memory ran out in a process that loads images; give fewer --workers"),
    ],
    ids=["killed", "bus error", "full", "ended", "memory"],
)
def test_processes_that_die_are_told_in_one_sentence_with_the_way_out(end: Callable[[], object], told: str):
    with pytest.raises(KcrPruneError, match=told) as caught:
        first(1, batches(Deadly(end), size=2, workers=1).from_step(0))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_more_processes_start_than_there_are_batches_for():
    assert in_order(Noisy(4), 2, workers=200).num_workers == 2
    before = len(psutil.Process().children())
    drawn = batches(Noisy(8), workers=200).from_step(0)
    next(drawn)
    assert len(psutil.Process().children()) == before + 2


def test_the_processes_that_load_stay_for_the_next_pass():
    loader = in_order(Noisy(5), 2, workers=1)
    passes = [[labels.tolist() for _, labels in loader] for _ in range(2)]
    assert passes == [[[0, 1], [2, 3], [4]]] * 2
    assert loader.persistent_workers
