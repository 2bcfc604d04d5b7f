"""Pickles are data: what plain ones hold comes out, what hostile ones ask for does not happen."""

import collections
import io
import os
import pickle
import struct
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcrprune.containers.pickled_calls import Stub
from kcrprune.containers.unpickle import MOST_OPCODES, Unpickled, unpickle
from kcrprune.errors import CheckpointError
from tests.containers.corpus import Payload

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


def read(data: bytes) -> Unpickled:
    return unpickle(io.BytesIO(data), "the pickle")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@given(value=PLAIN)
def test_plain_data_are_what_pickle_makes_of_them(value, protocol):
    assert read(pickle.dumps(value, protocol)).tree == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_of_the_standard_library(protocol):
    shared = [1]
    value = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"x": [1]}),
        "set": {3},
        "frozen": frozenset({4}),
        "bytes": bytearray(b"ab"),
        "shared": [shared, shared],
        "big": 1 << 4000,
    }
    tree = read(pickle.dumps(value, protocol)).tree
    assert list(tree["ordered"].items()) == [("b", 1), ("a", 2)]
    assert tree["default"] == {"x": [1]}
    assert (tree["set"], tree["frozen"], tree["bytes"], tree["big"]) == ([3], [4], b"ab", 1 << 4000)
    assert tree["shared"][0] is tree["shared"][1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda path: Payload(os.system, f"touch '{path}'"), f"{os.system.__module__}.system"),
        (lambda path: Payload(eval, f"open({str(path)!r}, 'w')"), "builtins.eval"),
        (lambda path: Payload(Namespace, Payload(open, str(path), "w")), "argparse.Namespace"),
        (lambda path: Payload(getattr, Payload(__import__, "os"), "system"), "builtins.getattr"),
    ],
)
def test_no_call_of_a_pickle_is_made(tmp_path, protocol, call, name):
    found = read(pickle.dumps({"weights": 1, "trap": call(tmp_path / "code-ran")}, protocol, fix_imports=False))
    assert not (tmp_path / "code-ran").exists()
    assert found.tree["weights"] == 1
    assert isinstance(found.tree["trap"], Stub)
    assert name in found.foreign_names


def test_the_payload_does_run_when_python_unpickles_it(tmp_path):
    pickle.loads(pickle.dumps(Payload(os.system, f"touch '{tmp_path / 'code-ran'}'")))
    assert (tmp_path / "code-ran").exists()


def test_attributes_of_a_foreign_object_are_data():
    found = read(pickle.dumps(Namespace(model="vit_tiny_patch16_224", lr=0.1)))
    assert found.tree.state == {"model": "vit_tiny_patch16_224", "lr": 0.1}
    assert found.foreign_names == ("argparse.Namespace",)


HOSTILE = {
    "too many instructions": b"\x80\x02" + b"N0" * (MOST_OPCODES // 2) + b"N.",
    "no end": b"\x80\x02}q\x00",
    "empty stack": b"\x80\x02s.",
    "nothing on the stack": b"\x80\x02.",
    "unknown instruction": b"\x80\x02\xff.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "a list's item for a number": b"\x80\x02K\x01K\x02a.",
    "a key for a list": b"\x80\x02]K\x01K\x02s.",
    "an extension": b"\x80\x02\x82\x01.",
    "a text of four gigabytes": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"ab.",
    "bytes of 16 exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1) + b"ab.",
    "a number of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"ab.",
    "a number of a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "copying one text for ever": b"\x80\x02c_codecs\nencode\nq\x00X"
    + struct.pack("<I", 2**20) + b"a" * 2**20 + b"\x85q\x01" + b"h\x00h\x01R0" * 1000 + b"N.",
    "data outside": b"\x80\x02K\x01Q.",
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_or_greedy_pickle_is_refused(data):
    with pytest.raises(CheckpointError, match=r"^the pickle "):
        read(data)


def test_a_large_memo_index_and_deep_nesting_cost_nothing():
    assert read(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".").tree is None
    nested = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert read(nested).tree


def test_a_key_whose_hash_takes_for_ever_is_left_out():
    doubled = b"\x80\x02K\x01" + b"2\x86" * 100  # (x, x), 100 times: 2**100 leaves
    assert read(b"\x80\x02}" + doubled[2:] + b"Ns.").tree == {}


@pytest.mark.parametrize(
    "form", ["({arguments}i{name}\n.", "(c{name}\n{arguments}o."], ids=["by its name", "behind the mark"]
)
def test_objects_of_the_oldest_pickles_are_calls_as_well(form):
    stub = read(form.format(name="argparse\nNamespace", arguments="I7\nI8\n").encode())
    assert isinstance(stub.tree, Stub)
    assert (stub.tree.name, stub.tree.arguments) == ("argparse.Namespace", (7, 8))
    assert stub.foreign_names == ("argparse.Namespace",)
    ordered = form.format(name="collections\nOrderedDict", arguments="((I1\nI2\ntl").encode()
    assert read(ordered).tree == pickle.loads(ordered) == {1: 2}
