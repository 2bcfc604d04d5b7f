"""Parts of a data set, drawn by address."""

from typing import Final

import torch
from torch.utils.data import Dataset, Subset

from kcrprune.training.randomness import generator

STAGE: Final = "images"  # of the addresses of parts


def split(dataset: Dataset, share: float, seed: int, what: str) -> tuple[Dataset, Dataset]:
    """Two disjoint parts, the first with `share` of all images, each in the original order.

    `what` is set apart addresses the draw, so data sets of one length are split alike under one name.
    """
    order = _shuffled(dataset, seed, what)
    count = round(share * len(order))
    return Subset(dataset, sorted(order[:count])), Subset(dataset, sorted(order[count:]))


def sample(dataset: Dataset, count: int, seed: int, what: str) -> Dataset:
    """`count` images, drawn for `what`, in the original order; all of them where there are no more."""
    return Subset(dataset, sorted(_shuffled(dataset, seed, what)[:count]))


def _shuffled(dataset: Dataset, seed: int, what: str) -> list[int]:
    return torch.randperm(len(dataset), generator=generator(seed, STAGE, 0, what)).tolist()  # type: ignore[arg-type]
