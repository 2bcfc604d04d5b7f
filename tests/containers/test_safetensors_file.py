"""Safetensors headers that contradict themselves or their file are refused; honest ones read as the library reads."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kcrprune.containers.safetensors_file import DTYPES, is_safetensors, read_header
from kcrprune.errors import CheckpointError


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def written(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_tensors_and_metadata_are_those_of_the_library(tmp_path):
    path = tmp_path / "file.safetensors"
    made = {
        f"as {dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int64)
    }
    made |= {"bool": torch.tensor([True, False]), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(made, path, {"a": "b"})
    header = read_header(path)
    expected = load_file(path)
    assert header.metadata == {"a": "b"}
    assert header.tensors.keys() == expected.keys()
    assert all(torch.equal(ref.read(), expected[name]) for name, ref in header.tensors.items())


HEADERS = {
    "no object": [1],
    "not JSON": b"{'w': 1}",
    "not text": b'{"\xff": 1}',
    "nested for ever": b'{"w":' + b"[" * 100_000,
    "metadata of numbers": {"__metadata__": {"a": 1}, "w": entry()},
    "no offsets": {"w": {"dtype": "F32", "shape": [2]}},
    "an unknown type that is no word": {"w": entry("\x1b[31m\n" * 99)},
    "an unknown type": {"w": entry("F8_E4M3")},
    "a type that is a list": {"w": entry() | {"dtype": ["F32"]}},
    "a negative size": {"w": entry(shape=(-2,))},
    "a size that is a fraction": {"w": entry(shape=(2.0,))},
    "a size that is no number": {"w": entry(shape=(True, 2))},
    "an enormous size": {"w": entry(shape=(2**60, 2**60))},
    "the wrong length": {"w": entry(shape=(3,))},
    "offsets backwards": {"w": entry(offsets=(8, 0))},
    "past the end": {"w": entry(shape=(4,), offsets=(0, 16))},
    "overlapping": {"w": entry(), "v": entry()},
    "a gap": {"w": entry(shape=(1,), offsets=(4, 8))},
    "bytes left over": {"w": entry(shape=(1,), offsets=(0, 4))},
    "NaN for a size": b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_false_header_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match=r"file\.safetensors") as caught:
        read_header(written(tmp_path / "file.safetensors", header))
    assert str(caught.value).isprintable()


def test_a_tensor_may_lie_at_any_byte(tmp_path):
    header = {"odd": entry("U8", (1,), (0, 1)), "w": entry("F32", (2,), (1, 9))}
    path = written(tmp_path / "file.safetensors", header, b"\1" + struct.pack("<2f", 1, 2))
    assert read_header(path).tensors["w"].read().tolist() == [1, 2]


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**63, 2**64 - 1])
def test_a_false_header_length_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match="header"):
        read_header(written(tmp_path / "file.safetensors", {"w": entry()}, length=length))


def test_every_truncation_is_refused(tmp_path):
    path = written(tmp_path / "file.safetensors", {"w": entry()})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_a_name_that_is_no_utf_8_is_to_be_changed(tmp_path):
    path = tmp_path / os.fsdecode(b"weights\xff.safetensors")
    written(path, {"w": entry()})
    with pytest.raises(CheckpointError, match="are read by names that are UTF-8; rename it"):
        read_header(path)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "U16", "U32", "U64"])
def test_a_type_that_no_weight_has_is_named_with_its_tensor(tmp_path, kind):
    size = 8 // {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}[kind]
    path = written(tmp_path / "file.safetensors", {"w\x1b": entry(kind, (size,))})
    with pytest.raises(CheckpointError, match=rf"tensor w\\x1b has the type {kind}, which is not read"):
        read_header(path)


@pytest.mark.parametrize("kind", DTYPES)
def test_each_type_is_that_of_the_library(tmp_path, kind):
    count = 8 // DTYPES[kind].itemsize
    path = written(tmp_path / "file.safetensors", {"w": entry(kind, (count,))}, bytes([1, 0] * 4))
    ref, expected = read_header(path).tensors["w"], load_file(path)["w"]
    assert (ref.dtype, ref.shape, ref.nbytes) == (expected.dtype, (count,), 8)
    assert torch.equal(ref.read(), expected)
    assert read_header(path).metadata == {}


@pytest.mark.parametrize(
    ("start", "like"),
    [
        (struct.pack("<Q", 2**48 - 1) + b"{", True),
        (struct.pack("<Q", 2**48) + b"{", False),
        (struct.pack("<Q", 2**56) + b"{", False),
        (struct.pack("<Q", 7) + b"[", False),
        (struct.pack("<Q", 7), False),
        (b"{", False),
        (b"", False),
    ],
)
def test_a_file_is_told_by_its_first_nine_bytes(tmp_path, start, like):
    path = tmp_path / "of any name"
    path.write_bytes(start)
    assert is_safetensors(path) == like
