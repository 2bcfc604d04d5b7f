"""What takes the place of an image that cannot be read, and how many may be."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

import torch
from torch.utils.data import Dataset

from kcrprune.errors import DataError, ImageError
from kcrprune.training.randomness import generator

LIMIT: Final = 0.01  # share of the images of a part, one at least, that others may take the place of
ATTEMPTS: Final = 8  # others that are drawn for one
SHOWN: Final = 5  # names in a sentence


@dataclass
class Replaced:
    """The names of those of a part's `images` that others took the place of."""

    images: int
    names: list[str] = field(default_factory=list)

    def note_(self, names: Iterable[str]) -> None:
        """Takes in the names of a batch, '' for an image that was read; DataError where they are too many."""
        self.names += [name for name in dict.fromkeys(names) if name and name not in self.names]
        if len(self.names) > max(1, ceil(LIMIT * self.images)):
            raise DataError(
                f"more than {LIMIT:.0%} of {self.images:,} images cannot be read: {some(self.names)}; remove them, or "
                "see whether their disk is still there"
            )

    def told(self, stage: str) -> str | None:
        """A sentence about them; None where there are none."""
        if not self.names:
            return None
        count = f"{len(self.names):,} of {self.images:,} images"
        return f"{stage}: {count} cannot be read and others took their place: {some(self.names)}"


class Replacing(Dataset):
    """(image, label, '') of a part; of an image that cannot be read another one's, and the name of the first.

    Which one follows from the seed, `what` the part is for and the index.
    """

    def __init__(self, dataset: Dataset, seed: int, what: str) -> None:
        self.dataset, self.seed, self.what = dataset, seed, what

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, str]:
        try:
            return (*self.dataset[index], "")
        except ImageError as error:
            return (*self._another(index, error), error.name)

    def _another(self, index: int, error: ImageError) -> tuple[Any, Any]:
        drawn = generator(self.seed, "images", 0, f"{self.what}: instead of {index}")
        for other in torch.randint(len(self), (ATTEMPTS,), generator=drawn).tolist():
            try:
                return self.dataset[other]
            except ImageError:
                continue
        raise error


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many there are."""
    names = list(names)
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names):,})"
