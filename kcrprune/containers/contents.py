"""What was found in a file, before any weight is read: named tensors by shape, and what the file says about them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kcrprune.errors import CheckpointError
from kcrprune.printable import printable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRef:
    """A tensor that still lies in its file; `read` brings it to memory."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """An opened container.

    `tree` is plain data (dicts, lists, numbers, text, stubs) with TensorRefs as leaves; `metadata` is what the
    container says in text, `config` and `preprocessor` what the JSON files beside it say.
    """

    path: Path  # what the user named
    files: tuple[Path, ...]  # what was read
    container: str  # for people: "safetensors file", ...
    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    foreign_names: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shape of every tensor by name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def read_all(refs: Mapping[str, TensorRef], limit: int, path: Path) -> dict[str, Tensor]:
    """The tensors themselves.

    Refused before any is read where together they are larger than `limit`, the bytes on disk, or than this machine.
    """
    total = sum(ref.nbytes for ref in refs.values())
    if total > limit:
        raise CheckpointError(
            f"{path} is {limit} bytes long but its tensors would take {total}; no honest checkpoint grows when read"
        )
    check_memory(2 * total, path)  # as they are, and in single precision
    return {name: ref.read() for name, ref in refs.items()}


def digest(files: Iterable[Path]) -> str:
    """The sha256 of some files, one after the other."""
    total = sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                total.update(block)
    return total.hexdigest()


def check_memory(needed: int, path: Path) -> None:
    """CheckpointError where `needed` bytes are more than this machine has."""
    import psutil  # has modules of the system itself, which differ

    available = psutil.virtual_memory().total
    if needed > available:
        raise CheckpointError(
            f"{path} needs {needed / 2**30:.1f} GB of memory, this machine has {available / 2**30:.1f}"
        )


def some(names: Sequence[str]) -> str:
    """The first three of a file's names for people."""
    return ", ".join(printable(name, 60) for name in names[:3]) + (", ..." if len(names) > 3 else "")
