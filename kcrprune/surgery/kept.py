"""Where the streams of all images lie while they wait: on a device, or in files whose pages the system may give up."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kcrprune.atomic import LEFTOVER
from kcrprune.errors import KcrPruneError

Keep = Callable[[Tensor], Tensor]  # where a tensor is kept; the figures are the same


def on(device: torch.device) -> Keep:
    """In the memory of a device."""
    return lambda tensor: tensor.to(device)


def in_files(folder: Path) -> Keep:
    """In files below `folder`, which are gone with the tensors; KcrPruneError where the disk has no room."""

    def keep(tensor: Tensor) -> Tensor:
        descriptor, name = tempfile.mkstemp(".part", LEFTOVER, folder)
        try:
            _reserve(descriptor, tensor.nbytes)
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        except OSError as error:
            raise KcrPruneError(
                f"{folder}: the streams of the images fit neither the memory nor this disk ({error.strerror}); give "
                "fewer --calibration-images, more --max-memory, or an --out on another disk"
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(name)  # noqa: PTH108 (what is mapped stays, on every system that has mmap)
        return mapped.copy_(tensor)

    return keep


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk: without it, writing to the mapped memory would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(1, size))
    else:
        os.truncate(descriptor, max(1, size))
