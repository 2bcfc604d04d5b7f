"""Safetensors files, opened by their own library, within limits of ours.

Layout: 8 bytes of header length (little endian), the header (JSON: name -> dtype, shape, data_offsets), the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from kcrprune.containers.contents import TensorRef
from kcrprune.containers.strict_json import LARGEST
from kcrprune.errors import CheckpointError
from kcrprune.printable import printable

DTYPES: Final[dict[str, torch.dtype]] = {
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
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST:  # the library takes 15 bytes of memory for a byte of header
        raise CheckpointError(f"{path} is not a whole safetensors file: its header cannot be {length} bytes long")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        if "not valid UTF-8" in str(error):
            raise CheckpointError(f"{path}: safetensors files are read by names that are UTF-8; rename it") from error
        raise CheckpointError(f"{path} is damaged or cut short: {printable(str(error), 200)}") from error
    return Header({name: _ref(path, opened, name) for name in opened.keys()}, opened.metadata() or {})  # noqa: SIM118 (no mapping)


def _ref(path: Path, opened: safe_open, name: str) -> TensorRef:
    tensor = opened.get_slice(name)
    kind, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if kind not in DTYPES:
        raise CheckpointError(f"{path}: tensor {printable(name, 200)} has the type {kind}, which is not read")
    return TensorRef(DTYPES[kind], shape, partial(opened.get_tensor, name))


def is_safetensors(path: Path) -> bool:
    """True where a file begins like a safetensors file, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[6:8] == b"\0\0"
