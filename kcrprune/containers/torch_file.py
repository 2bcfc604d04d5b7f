"""What torch.save writes: pickles that refer to storages, in a zip file or in the older single stream."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from kcrprune.containers.contents import TensorRef
from kcrprune.containers.pickled_arrays import ARRAYS
from kcrprune.containers.pickled_calls import Call, Name
from kcrprune.containers.stored_zip import StoredZip, open_stored_zip
from kcrprune.containers.unpickle import Unpickled, unpickle
from kcrprune.errors import CheckpointError

MAGIC: Final = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER of the older stream
STORAGES: Final[dict[str, torch.dtype]] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES: Final[dict[str, torch.dtype]] = {f"torch.{name}": getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
)}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A run of numbers outside the pickle; `read(first, size)` gets some of its bytes."""

    dtype: torch.dtype
    nbytes: int
    read: Callable[[int, int], bytearray]


def read_zip(path: Path) -> Unpickled:
    """The data of a torch zip file (or TorchScript archive), its tensors unread."""
    archive = open_stored_zip(path)
    pickles = [name for name in archive.entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote: it has no data.pkl")
    folder = min(pickles, key=len).removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.entries and archive.read(f"{folder}byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine, which is not read")
    data = bytes(archive.read(f"{folder}data.pkl"))
    return unpickle(BytesIO(data), str(path), partial(_zip_storage, archive, folder), CALLS)


def _zip_storage(archive: StoredZip, folder: str, identity: Any) -> Storage:
    kind, key, count = _storage_identity(identity)
    name = f"{folder}data/{key}"
    nbytes = archive.entries[name].size
    if count * kind.itemsize > nbytes:
        raise ValueError(f"storage {key[:20]!r} is shorter than it says")
    return Storage(kind, nbytes, partial(archive.read, name))


def _storage_identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and number of elements of ('storage', class, key, location, count, ...)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    _, cls, key, _, count = identity[:5]
    name = cls.text.rpartition(".")[2] if isinstance(cls, Name) else ""
    if name not in STORAGES or type(count) is not int or count < 0 or not isinstance(key, str):
        raise ValueError(f"it has a storage of the type {name[:40]!r}")
    return STORAGES[name], key, count


def read_stream(path: Path) -> Unpickled:
    """The data of the older stream: three small pickles, the object, the storages' keys, the storages."""
    with path.open("rb") as file:
        for _ in range(3):  # magic number, protocol, sizes of the machine's types
            unpickle(file, str(path))
        lacking: dict[str, Storage] = {}
        places: dict[str, tuple[int, int]] = {}
        read = partial(_stream_storage, path, places, lacking)
        data = unpickle(file, str(path), read, CALLS)
        keys = unpickle(file, str(path)).tree
        _place(file, path, keys, lacking, places)
    return data


def _stream_storage(
    path: Path, places: dict[str, tuple[int, int]], lacking: dict[str, Storage], identity: Any
) -> Storage:
    dtype, key, count = _storage_identity(identity)
    if len(identity) > 5 and identity[5] is not None:
        raise ValueError("it has a view of a storage, as torch wrote before 0.4")
    nbytes = count * dtype.itemsize
    if nbytes > path.stat().st_size:
        raise ValueError(f"storage {key[:20]!r} is longer than the file")

    def read(first: int, size: int) -> bytearray:
        offset, available = places[key]
        data = bytearray(size)
        with path.open("rb") as file:
            file.seek(offset + first)
            if first + size > available or file.readinto(data) != size:
                raise CheckpointError(f"{path} is damaged: it refers past the end of a storage")
        return data

    return lacking.setdefault(key, Storage(dtype, nbytes, read))


def _place(
    file: BinaryIO, path: Path, keys: Any, storages: dict[str, Storage], places: dict[str, tuple[int, int]]
) -> None:
    """Finds where each storage lies: one after the other in the order of `keys`, each behind its element count."""
    size = path.stat().st_size
    for key in keys if isinstance(keys, list) else []:
        head = file.read(8)
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or len(head) < 8 or struct.unpack("<q", head)[0] * storage.dtype.itemsize != storage.nbytes:
            raise CheckpointError(f"{path} is damaged or cut short: a storage is missing")
        places[key] = file.tell(), storage.nbytes
        if file.seek(storage.nbytes, 1) > size:
            raise CheckpointError(f"{path} is cut short: a storage ends past the end of the file")
    if storages.keys() != places.keys():
        raise CheckpointError(f"{path} is damaged or cut short: {len(storages) - len(places)} storages are missing")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    """The reference that stands for torch._utils._rebuild_tensor_v2."""
    if not isinstance(storage, Storage):
        raise TypeError("a tensor has no storage")
    return _strided(storage, storage.dtype, offset, size, stride)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRef:
    """The reference that stands for torch._utils._rebuild_tensor_v3, whose storage has no type."""
    named = DTYPES.get(dtype.text) if isinstance(dtype, Name) else None
    if not isinstance(storage, Storage) or named is None:
        raise TypeError("a tensor has no storage or no known type")
    return _strided(storage, named, offset, size, stride)


def _strided(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> TensorRef:
    for values in ((offset,), size, stride):
        if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**48 for value in values):
            raise ValueError("the shape of a tensor cannot be")
    if len(size) != len(stride) or len(size) > 8:
        raise ValueError("the shape of a tensor cannot be")
    span = 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if prod(size) else 0
    if (offset + span) * dtype.itemsize > storage.nbytes:
        raise ValueError("a tensor reaches past the end of its storage")

    def read() -> Tensor:
        if not span:
            return torch.empty(size, dtype=dtype)
        data = storage.read(offset * dtype.itemsize, span * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).as_strided(size, stride).contiguous()

    return TensorRef(dtype, size, read)


def _itself(data: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return data


CALLS: Final[dict[str, Call]] = {
    **ARRAYS,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _itself,
    "torch._utils._rebuild_parameter_with_state": _itself,
    "torch.nn.parameter.Parameter": _itself,
    "torch.nn.parameter.Buffer": _itself,
}
