"""Pickles are data: what plain ones hold comes out, what hostile ones ask for does not happen."""

import collections
import gc
import io
import os
import pickle
import struct
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcrprune.containers import unpickle as machine
from kcrprune.containers.pickled_calls import Buildable, Name, Stub, is_harmless, pairs
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


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("builtins dict", "((I1\nI2\ntl", {1: 2}),
        ("builtins list", "(I1\nI2\nl", [1, 2]),
        ("builtins frozenset", "(I1\nI2\nl", [1, 2]),
        ("__builtin__ set", "(I1\nI2\nl", [1, 2]),
        ("torch Size", "(I1\nI2\nt", (1, 2)),
        ("collections defaultdict", "c__builtin__\nlist\n", {}),
        ("builtins bytes", "", b""),
        ("__builtin__ bytearray", "Va\u00e9\nVlatin-1\n", b"a\xe9"),
        ("builtins bytes", "Va\u00e9\nVutf-8\n", "aé".encode()),
        ("_codecs encode", "V\u00e9\n", "é".encode()),
        ("_codecs encode", "V\u00e9\nVlatin1\n", b"\xe9"),
    ],
)
def test_the_calls_that_are_made_build_plain_data(name, arguments, expected):
    module, qualname = name.split()
    found = read(f"c{module}\n{qualname}\n({arguments}tR.".encode("latin-1"))
    assert found.tree == expected
    assert type(found.tree) is type(expected)
    assert found.foreign_names == ()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("c__builtin__\nset\n(I7\ntR.", "a sequence is made of what is none"),
        ("c__builtin__\nset\n(VX\ntR.", "a sequence is made of what is none"),
        ("c__builtin__\nbytes\n(I7\ntR.", "bytes are made of what is none"),
        ("c__builtin__\nbytes\n(Va\ntR.", "bytes are made of what is none"),
        ("I1\nI2\n\x93.", "a name is not a text"),
        ("(I1\nI2\nI3\nd.", "is damaged"),
    ],
)
def test_a_call_of_something_else_is_refused_with_the_reason(call, reason):
    with pytest.raises(CheckpointError, match=f"^the pickle is damaged or no checkpoint: .*{reason}|{reason}"):
        read(call.encode("latin-1"))


def test_a_call_that_names_another_call_is_that_call():
    ordered = b"ccopy_reg\n_reconstructor\n(ccollections\nOrderedDict\nc__builtin__\nobject\nNtR."
    assert read(ordered).tree == {}
    stub = read(ordered.replace(b"collections\nOrderedDict", b"argparse\nNamespace"))
    assert (stub.tree.name, stub.tree.arguments, stub.foreign_names) == (
        "argparse.Namespace",
        (),
        ("argparse.Namespace",),
    )
    typed = b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nlist\nNN(I1\nltt\x85R."
    assert isinstance(read(b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nlist\nN((I1\nlttR.").tree, list)
    assert typed


def test_a_stub_remembers_its_arguments_items_entries_and_state():
    built = read(b"cmine\nThing\n(I1\ntRI2\na(I3\nI4\neVk\nI5\ns(Vl\nI6\nu}Va\nI7\nsb.").tree
    assert isinstance(built, Stub)
    assert (built.name, built.arguments) == ("mine.Thing", (1,))
    assert (built.items, built.entries, built.state) == ([2, 3, 4], {"k": 5, "l": 6}, {"a": 7})
    assert repr(built) == "<stub of mine.Thing>"
    assert read(b"I1\n(tR.").tree.name == "a int", "what is called may be anything"
    assert read(b"]q\x00}b.").tree == [], "a state for plain data is passed over"


def test_pairs_are_keys_and_values_in_turn():
    assert pairs([]) == {}
    assert pairs([1, "a", (2, None), [3], 1, "b"]) == {1: "b", (2, None): [3]}
    with pytest.raises(ValueError, match="shorter"):
        pairs([1, "a", 2])


@pytest.mark.parametrize("key", [[], {}, (1, [2]), ((1,),), Stub("x"), Name("x")])
def test_a_key_that_is_not_plain_is_left_out(key):
    assert pairs([key, 1, "a", 2]) == {"a": 2}


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("torch.float32", True),
        ("torch.bool", True),
        ("torch.FloatStorage", True),
        ("numpy.ndarray", True),
        ("builtins.object", True),
        ("torch.load", False),
        ("mine.FloatStorage", False),
        ("os.system", False),
        ("builtins.eval", False),
    ],
)
def test_names_that_nobody_is_told_of(name, harmless):
    assert is_harmless(name) == harmless
    module, _, qualname = name.rpartition(".")
    found = read(f"c{module}\n{qualname}\n.".encode())
    assert found.foreign_names == (() if harmless else (name,))
    assert found.tree == Name(name)


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_looked_for_again_afterwards_where_it_was_before(collecting):
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        read(b"N.")
        assert gc.isenabled() == collecting
        with pytest.raises(CheckpointError):
            read(b"h\x07.")
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()


def test_more_memory_than_there_is_ends_in_a_sentence(monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setitem(machine.OPCODES, "NONE", none)
    with pytest.raises(CheckpointError, match="asks for more memory than there is"):
        read(b"N.")


def test_what_lies_outside_is_asked_for_by_either_way_of_naming_it():
    found = unpickle(io.BytesIO(b"(Pone\nI2\nQt."), "x", lambda identity: f"<{identity}>")
    assert found.tree == ("<one>", "<2>")
    assert read(b"(I1\nI2\n0I3\nt.").tree == (1, 3), "what is dropped is gone"
    assert read(b"I1\n(I2\nI3\n1.").tree == 1
    assert read(b"I1\n2\x86.").tree == (1, 1)
    with pytest.raises(NotImplementedError):
        Buildable().built(None)


def test_instructions_are_counted_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "MOST_OPCODES", 5)
    assert read(b"NNNN.").tree is None
    with pytest.raises(CheckpointError, match=r"^the pickle has more than 5 instructions, so it is not read"):
        read(b"NNNNN.")


def test_admitted_calls_may_copy_a_megabyte_and_four_times_what_was_read():
    text = b"X" + struct.pack("<I", 2**18) + b"a" * 2**18 + b"\x85q\x01"
    call = b"h\x00h\x01R0"

    def copies(count):
        return b"\x80\x02c_codecs\nencode\nq\x00" + text + call * count + b"N."

    assert read(copies(7)).tree is None
    with pytest.raises(CheckpointError, match="it copies the same data over and over"):
        read(copies(9))
