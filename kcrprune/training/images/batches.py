"""Batches of images: in order, or drawn by address."""

from collections.abc import Iterator
from itertools import count, islice, pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kcrprune import processes
from kcrprune.errors import DataError
from kcrprune.training.images import workers as loading
from kcrprune.training.images.unreadable import Replaced, Replacing
from kcrprune.training.randomness import generator, seeded

Address = tuple[int, int]  # epoch, index of an image


class Batches:
    """(images, labels) of one stage: batch `step` follows from (seed, stage, step) alone.

    An epoch takes all images in an order of its own, but for those that fill no batch, and augments each by (seed,
    stage, epoch, image). So the number of processes that load changes no bit, nor does the step to begin with.
    Iterated over, it is the first epoch. Of several processes each takes its part of the same batches. `replaced` names
    the images that could not be read, so far, and `waited` is the time that whoever took the batches waited for them,
    in seconds.
    """

    def __init__(
        self, dataset: Dataset, size: int, *, seed: int, stage: str, workers: int = 0, pinned: bool = False
    ) -> None:
        self.dataset, self.size, self.seed, self.stage = dataset, size, seed, stage
        self.workers, self.pinned = workers, pinned  # pinned: in memory that a GPU reads while others work
        self.images: int = len(dataset)  # type: ignore[arg-type]
        assert 0 < size <= self.images, "an epoch has at least one batch"
        self.replaced, self.waited = Replaced(self.images), 0.0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.images // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._loaded(islice(self._addresses(0), len(self)))

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches from this step on."""
        return self._loaded(self._addresses(step))

    def _addresses(self, step: int) -> Iterator[list[Address]]:
        first, done = divmod(step, len(self))
        for epoch in count(first):
            order = torch.randperm(self.images, generator=generator(self.seed, self.stage, epoch, "order"))
            for batch in order.split(self.size)[done : len(self)]:
                yield [(epoch, index) for index in processes.own(batch.tolist())]
            done = 0

    def _loaded(self, addresses: Iterator[list[Address]]) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = _Addressed(Replacing(self.dataset, self.seed, self.stage), self.seed, self.stage)
        workers = min(self.workers, len(self))
        batches = iter(loader(dataset, workers, batch_sampler=addresses, pin_memory=self.pinned))
        for number in count():
            start = perf_counter()
            if (batch := next(batches, None)) is None:
                return
            self.waited += perf_counter() - start if number > 0 else 0  # processes take a while to start
            images, labels, names = batch
            self.replaced.note_(names)
            yield images, labels


def in_order(dataset: Dataset, size: int, *, workers: int = 0, pinned: bool = False) -> DataLoader:
    """Batches of a whole data set, in its order; the processes that load stay from one pass to the next.

    Of several processes each takes its part of the same batches.
    """
    if isinstance(dataset, IterableDataset):
        return loader(dataset, 0, batch_size=size, pin_memory=pinned)
    batches = [processes.own(batch) for batch in _divided(len(dataset), size)]  # type: ignore[arg-type]
    workers = min(workers, len(batches))
    persistent = workers > 0
    return loader(dataset, workers, batch_sampler=batches, persistent_workers=persistent, pin_memory=pinned)


def _divided(images: int, size: int) -> list[range]:
    """The places of all images in batches of `size`; a last one too small for all processes joins the one before."""
    starts = list(range(0, images, size))
    if len(starts) > 1 and images - starts[-1] < processes.count():
        starts.pop()
    return [range(start, end) for start, end in pairwise([*starts, images])]


class _Addressed(Dataset):
    """The images of a data set by address, which what is drawn to augment them follows from."""

    def __init__(self, dataset: Dataset, seed: int, stage: str) -> None:
        self.dataset, self.seed, self.stage = dataset, seed, stage

    def __getitem__(self, address: Address) -> Any:
        epoch, index = address
        with seeded(self.seed, self.stage, epoch, f"image {index}"):
            return self.dataset[index]


def loader(dataset: Dataset, workers: int, **order: Any) -> DataLoader:
    """torch's, whose errors are sentences, and which leaves the global generators alone."""
    own = torch.Generator()  # loaders seed their processes, and would draw that from torch's global state
    return _Loader(dataset, num_workers=workers, generator=own, **order)


class _Loader(DataLoader):
    """A loader whose processes' DataErrors arrive without their traceback, and whose ends are told in a sentence."""

    def __iter__(self) -> Any:  # a generator, where torch hands out its own iterator
        try:
            yield from super().__iter__()
        except DataError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise DataError(last_line.removeprefix(f"{DataError.__module__}.{type(error).__name__}: ")) from None
        except (RuntimeError, OSError, MemoryError) as error:
            raise loading.told(error, self.num_workers) or error from None
