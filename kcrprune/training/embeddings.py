"""How near a network's features are to another's: distance, cosine, and which image each of them finds next to which.

Letters: B images of a batch, n of all, d channels.
"""

from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kcrprune import processes
from kcrprune.errors import DataError
from kcrprune.method.objective import relative_distances

ROWS: Final = 1024  # images whose cosines with all others are in memory together


@dataclass(frozen=True)
class Nearness:
    """Means over images; `retrieval` is None for a single image, which has no neighbour."""

    distance: float  # relative_distances
    cosine: float
    retrieval: float | None  # how often both networks find the same image nearest to one


@dataclass
class NearnessTotals:
    """Sums over the images so far; features stay on their device until the end, since neighbours need all of them."""

    distance: Tensor | float = 0.0
    cosine: Tensor | float = 0.0
    own: list[Tensor] = field(default_factory=list)  # unit vectors, (B, d) each
    others: list[Tensor] = field(default_factory=list)

    def add_(self, features: Tensor, wanted: Tensor) -> None:
        """Takes in the features (B, ...) of both networks; DataError where their shapes differ."""
        if features.shape != wanted.shape:
            raise DataError(
                f"the network's features have the shape {tuple(features.shape[1:])} and the reference's "
                f"{tuple(wanted.shape[1:])}; only networks with features of one shape can be compared"
            )
        wanted = wanted.to(features.device, non_blocking=True)
        own, others = (F.normalize(each.flatten(1), dim=1) for each in (features, wanted))
        self.distance += relative_distances(features, wanted).double().sum()
        self.cosine += (own * others).sum(1).double().sum()
        self.own.append(own)
        self.others.append(others)

    def gather_over_processes_(self) -> None:
        """Takes in what the other processes have seen of their own images."""
        if processes.count() == 1:
            return
        self.own, self.others = (processes.rows_of_all(each) for each in (self.own, self.others))
        self.distance, self.cosine = (
            processes.summed(torch.as_tensor(each, dtype=torch.float64)) for each in (self.distance, self.cosine)
        )

    def result(self) -> Nearness:
        """The figures; the neighbours take n^2 d multiplications for each network."""
        images = sum(map(len, self.own))
        found = None
        if images > 1:
            nearest = (neighbours(torch.cat(each)) for each in (self.own, self.others))
            found = float(torch.eq(*nearest).double().mean())
        return Nearness(float(self.distance) / images, float(self.cosine) / images, found)


def neighbours(units: Tensor) -> Tensor:
    """(n,) of unit vectors (n, d): the index of the other one with the largest cosine."""
    found = []
    for start, rows in zip(range(0, len(units), ROWS), units.split(ROWS), strict=True):
        cosines = rows @ units.T  # (ROWS, n)
        cosines.diagonal(offset=start).fill_(-torch.inf)
        found.append(cosines.argmax(1))
    return torch.cat(found)
