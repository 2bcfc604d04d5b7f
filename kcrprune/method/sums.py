"""Sums over images that add up: over batches, over shards and over the processes of a group."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from kcrprune import processes


@dataclass
class Sums:
    """Base of a dataclass whose every field is additive: a float64 tensor, or a count."""

    def merge_(self, other: Self) -> Self:
        """Takes in what another has seen."""
        for name, mine in self._fields().items():
            theirs = getattr(other, name)
            setattr(self, name, mine + (theirs.to(mine) if isinstance(mine, Tensor) else theirs))
        return self

    def sum_over_processes_(self) -> Self:
        """Takes in what every other process of the group has seen of its own images; alone, it changes nothing.

        A collective call: all processes make it, and all end with the same sums, bit for bit. What was summed once
        must not be summed again.
        """
        if processes.count() == 1:
            return self
        every = self._fields()
        device = next(iter(each.device for each in every.values() if isinstance(each, Tensor)))
        parts = [torch.as_tensor(value, dtype=torch.float64, device=device).flatten() for value in every.values()]
        total = processes.summed(torch.cat(parts))  # counts are exact in it up to 2^53
        for (name, mine), part in zip(every.items(), total.split([len(part) for part in parts]), strict=True):
            setattr(self, name, part.view(mine.shape).to(mine) if isinstance(mine, Tensor) else int(part))
        return self

    def _fields(self) -> dict[str, Tensor | int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def gram(x: Tensor) -> Tensor:
    """x^T x (I, I) of x (n, I), of which most of the lower half is a copy of the upper one where it is large."""
    size = x.shape[1]
    if size < 512:  # a choice of ours: below it several products take longer than one
        return x.T @ x
    found, step = x.new_empty(size, size), -(-size // 4)
    for start in range(0, size, step):
        end = min(start + step, size)
        found[start:end, start:] = x[:, start:end].T @ x[:, start:]
        found[end:, start:end] = found[start:end, end:].T
    return found
