"""numpy arrays and scalars in pickles, read as data."""

import struct
from collections.abc import Mapping
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from kcrprune.containers.contents import TensorRef
from kcrprune.containers.pickled_calls import Buildable, Call

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool, "u1": torch.uint8,
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
}  # fmt: skip


class _Dtype(Buildable):
    """numpy.dtype(code), completed by a state whose second entry is the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""
        self.big = False

    def built(self, state: Any) -> "_Dtype":
        self.big = state[1] == ">"
        return self

    @property
    def torch(self) -> torch.dtype:
        """The same in torch; ValueError for a type that no weight has."""
        dtype = DTYPES.get(self.code.lstrip("<|="))
        if dtype is None or self.big:
            raise ValueError(f"it holds numbers of the type {self.code[:20]!r}")
        return dtype


class _Array(Buildable):
    """An array of which only the class is known until its state (version, shape, dtype, order, bytes) comes."""

    def __init__(self, *_: Any) -> None:
        pass

    def built(self, state: Any) -> Any:
        _, shape, dtype, fortran, data = state
        return _ref(data, dtype, shape, fortran=bool(fortran))


def _ref(data: Any, dtype: Any, shape: Any, *, fortran: bool) -> TensorRef | None:
    """The tensor of an array's bytes; None for an array of objects."""
    data = data.encode("latin-1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype):
        return None
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("the shape of an array cannot be")
    if len(data) != prod(shape) * dtype.torch.itemsize:
        raise ValueError("an array is not as long as its shape says")
    return TensorRef(dtype.torch, shape, lambda: _tensor(data, dtype.torch, shape, fortran=fortran))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> TensorRef | None:
    return _ref(data, dtype, shape, fortran=order == "F")


def _tensor(data: bytes | bytearray, dtype: torch.dtype, shape: tuple[int, ...], *, fortran: bool) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


def _scalar(dtype: Any, data: Any) -> int | float | None:
    data = data.encode("latin-1") if isinstance(data, str) else data
    code = {"f8": "d", "f4": "f", "i8": "q", "i4": "i"}.get(dtype.code) if isinstance(dtype, _Dtype) else None
    if code is None or dtype.big or not isinstance(data, bytes):
        return None
    if len(data) != struct.calcsize(code):
        raise ValueError("a number is not as long as its type says")
    return struct.unpack("<" + code, data)[0]


ARRAYS: Final[Mapping[str, Call]] = {
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
