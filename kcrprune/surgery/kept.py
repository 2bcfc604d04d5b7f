"""Where images and their streams lie while they wait: on a device, or in files whose pages the system may give up."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kcrprune.atomic import LEFTOVER, remove, require_room
from kcrprune.errors import KcrPruneError

Keep = Callable[[Tensor], Tensor]  # where a tensor is kept; the figures are the same


def on(device: torch.device) -> Keep:
    """In the memory of a device."""
    return lambda tensor: tensor.to(device)


def pinned(tensor: Tensor) -> Tensor:
    """In the machine's memory, where a GPU reads and writes it without the CPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def in_files(folder: Path) -> Keep:
    """In files below `folder`, which are gone with the tensors; KcrPruneError where the disk has no room."""

    def keep(tensor: Tensor) -> Tensor:
        try:
            mapped = zeros_in_file(folder, tensor.shape, tensor.dtype)
        except OSError as error:
            raise KcrPruneError(
                f"{folder}: what is kept of the images fits neither the memory nor this disk ({error.strerror}); give "
                "fewer --calibration-images, more --max-memory, or another disk (--out for streams, TMPDIR for images)"
            ) from error
        return mapped.copy_(tensor)

    return keep


def zeros_in_file(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in a file that is gone with it, which processes share that are forked; OSError without room."""
    size = prod(shape)
    with _file(folder, max(1, size * dtype.itemsize)) as name:
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(tuple(shape))


@contextmanager
def _file(folder: Path, size: int) -> Iterator[str]:
    """A file with room on the disk, without which writing to the mapped memory would end the process; then it is gone.

    What is mapped stays. A system that does not let it go leaves it to whoever next works in the run.
    """
    descriptor, name = tempfile.mkstemp(".part", LEFTOVER, folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            require_room(Path(name), size)
        yield name
    finally:
        os.close(descriptor)
        remove(Path(name))
