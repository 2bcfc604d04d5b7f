"""numpy's arrays and scalars in pickles hold what numpy says, and nothing is read of what is no weight."""

import io
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch

from kcrprune.containers.contents import TensorRef
from kcrprune.containers.pickled_arrays import DTYPES
from kcrprune.containers.torch_file import CALLS
from kcrprune.containers.unpickle import unpickle
from kcrprune.errors import CheckpointError

multiarray: Any = sys.modules[np.zeros(1).__reduce__()[0].__module__]  # type: ignore[union-attr]

FLOATS, EVEN = np.dtype("f4"), np.arange(24).reshape(2, 3, 4) % 5


def read(value, protocol=4):
    return unpickle(io.BytesIO(pickle.dumps(value, protocol)), "the pickle", None, CALLS).tree


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("code", DTYPES)
def test_arrays_are_those_of_numpy_in_every_type_order_and_protocol(code, protocol):
    plain = EVEN.astype(code)
    for array in (plain, np.asfortranarray(plain), plain.T, plain[:, ::2], plain[:0], plain[0, 0, :1].reshape(())):
        ref = read(array, protocol)
        assert isinstance(ref, TensorRef)
        assert (ref.dtype, ref.shape) == (DTYPES[code], array.shape)
        assert torch.equal(ref.read(), torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape))


@pytest.mark.parametrize("array", [EVEN.astype(">f4"), EVEN.astype("c8"), EVEN.astype("u4"), np.array(["a"])])
def test_types_that_no_weight_has_are_refused(array):
    with pytest.raises(CheckpointError, match="holds numbers of the type"):
        read(array)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("scalar", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(-7), -7),
        (np.int32(2**31 - 1), 2**31 - 1),
        (np.uint8(3), None),
    ],
)
def test_scalars_are_numbers_where_their_type_is_one_of_pythons(scalar, expected, protocol):
    assert read({"lr": scalar}, protocol) == {"lr": expected}


class Call:
    """Pickles to a call of a numpy function with these arguments."""

    def __init__(self, name, *arguments, state=None):
        self.name, self.arguments, self.state = name, arguments, state

    def __reduce__(self):
        return (getattr(multiarray, self.name), self.arguments, *([self.state] if self.state else []))


def array_of(shape, data, dtype: Any = FLOATS):
    return Call("_reconstruct", np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


@pytest.mark.parametrize("shape", [(2,), (-1,), (2**40,), (True,), [1], (1.0,)])
def test_an_array_is_as_long_as_its_shape_says(shape):
    with pytest.raises(CheckpointError, match="an array"):
        read(array_of(shape, b"\0" * 4))


def test_an_array_of_objects_and_one_without_a_type_hold_nothing():
    assert read(np.array([{}, None], dtype=object)) is None
    assert read(array_of((1,), b"\0" * 4, "f4")) is None


def test_a_scalar_of_another_byte_order_is_not_misread():
    assert read(Call("scalar", np.dtype("<f8"), np.float64(2.5).tobytes())) == 2.5
    assert read(Call("scalar", np.dtype(">f8"), np.float64(2.5).tobytes())) is None


def test_a_scalar_of_another_length_is_refused():
    with pytest.raises(CheckpointError, match="a number is not as long as its type says"):
        read(Call("scalar", np.dtype("f8"), b"\0" * 4))
