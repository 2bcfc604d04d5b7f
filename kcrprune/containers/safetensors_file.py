"""Safetensors files, checked against their own size before a tensor is read.

Layout: 8 bytes of header length (little endian), the header (JSON: name -> dtype, shape, data_offsets), the tensors.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kcrprune.containers.contents import Shape, TensorRef
from kcrprune.containers.strict_json import LARGEST, parse_object
from kcrprune.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Header:
    """A checked header: every tensor by name, and the text metadata."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; CheckpointError where it contradicts itself or the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST):
            raise CheckpointError(f"{path} is not a whole safetensors file: its header cannot be {length} bytes long")
        raw = parse_object(file.read(length), f"the header of {path}")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata in its header is not a table of texts")
    begin = 8 + length
    tensors = {name: _entry(path, name, entry, begin, size) for name, entry in raw.items()}
    _no_overlap(path, raw, size - begin)
    return Header(tensors, metadata)


def _entry(path: Path, name: str, entry: Any, begin: int, size: int) -> TensorRef:
    wrong = CheckpointError(f"{path}: the header's entry for {name[:80]!r} is damaged")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_naturals(shape) and len(shape) <= 8 and _naturals(offsets) and len(offsets) == 2):
        raise wrong
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name[:80]!r} has the type {str(entry['dtype'])[:20]!r}, which is not read"
        )
    first, last = offsets
    if last - first != prod(shape) * dtype.itemsize or begin + last > size:
        raise CheckpointError(f"{path} is damaged or cut short: tensor {name[:80]!r} does not fit into the file")
    return TensorRef(dtype, tuple(shape), _reader(path, begin + first, dtype, tuple(shape)))


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _no_overlap(path: Path, raw: Mapping[str, Any], size: int) -> None:
    end = 0
    for first, last in sorted(entry["data_offsets"] for entry in raw.values()):
        if first != end:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps")
        end = last
    if end != size:
        raise CheckpointError(f"{path} is damaged or cut short: its tensors end at byte {end} of {size}")


def _reader(path: Path, offset: int, dtype: torch.dtype, shape: Shape) -> Any:
    def read() -> Tensor:
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with path.open("rb") as file:
            file.seek(offset)
            data = bytearray(count * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path} became shorter while it was read")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return read


def is_safetensors(path: Path) -> bool:
    """True where a file begins like a safetensors file, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[6:8] == b"\0\0"
