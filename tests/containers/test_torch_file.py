"""Torch files: the same tensors as torch.load, and nothing from a file that is cut, bent or packed."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from kcrprune.artifact.artifact import open_model
from kcrprune.containers.container import open_container
from kcrprune.containers.contents import Contents, TensorRef, check_memory, digest, read_all, shapes_of, some
from kcrprune.containers.modules import MOST_PARTS, attributes, is_module, parts, state_dict
from kcrprune.containers.pickled_calls import Stub
from kcrprune.containers.torch_file import MAGIC
from kcrprune.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of many types and layouts; some share a storage."""
    base = torch.arange(24.0).reshape(4, 6)
    made = {f"as {dtype}": (base / 3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)}
    return made | {
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "step": base[::2, ::3],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "bool": base > 5,
        "parameter": nn.Parameter(base + 1),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_tensors_are_those_of_torch_load(tmp_path, zipped):
    path = tmp_path / "file.pth"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)
    contents = open_container(path)
    assert contents.tree.keys() == expected.keys()
    for name, ref in contents.tree.items():
        assert torch.equal(ref.read(), expected[name])
        assert ref.dtype == expected[name].dtype
    assert contents.foreign_names == ()


def test_a_pickled_module_has_the_state_dict_of_the_module(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("transient", torch.ones(2), persistent=False)
    torch.save(module, tmp_path / "module.pth")
    refs = state_dict(open_container(tmp_path / "module.pth").tree)
    assert refs.keys() == module.state_dict().keys()
    assert all(torch.equal(refs[name].read(), value) for name, value in module.state_dict().items())


def test_a_module_that_shares_its_parts_for_ever_is_refused(tmp_path):
    module = nn.Linear(1, 1)
    for _ in range(60):
        module = nn.Sequential(module, module)
    torch.save(module, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="more than 50000 parts"):
        open_model(tmp_path / "module.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(tmp_path, zipped):
    path = tmp_path / "file.pth"
    torch.save({"w": torch.arange(100.0), "v": torch.arange(50)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"file\.pth"):
            open_container(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"w": torch.arange(100.0)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(100.0).numpy().tobytes()) + 41
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the checksum of its entry '.*data/0' differs"):
        open_container(path).tree["w"].read()


def test_a_file_without_checksums_opens(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(100.0)}, tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_container(tmp_path / "file.pth").tree["w"].read(), torch.arange(100.0))


def repacked(path: Path, compression: int, rename=lambda name: name) -> Path:
    """The same torch file as another program would pack it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(rename(name), old.read(name))
    path.write_bytes(buffer.getvalue())
    return path


def test_compressed_entries_are_not_unpacked(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"w": torch.zeros(2**20)}, path)
    assert open_container(repacked(path, zipfile.ZIP_STORED)).tree["w"].read().sum() == 0
    with pytest.raises(CheckpointError, match="is compressed"):
        open_container(repacked(path, zipfile.ZIP_DEFLATED))


def test_a_zip_file_of_something_else(tmp_path):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        open_container(path)


def test_many_tensors_over_one_number_are_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({f"w{index}": torch.zeros(1).expand(2**15, 2**15) for index in range(64)}, path)
    contents = open_container(path)
    with pytest.raises(CheckpointError, match=r"its tensors would take 274877906944; no honest checkpoint"):
        read_all(contents.tree, contents.nbytes, path)


def test_more_than_the_machine_has_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"file\.pth needs 1048576\.0 GB of memory, this machine has"):
        check_memory(2**50, tmp_path / "file.pth")


NUMBERS = torch.arange(6.0)


class Reference:
    """Pickles to a persistent id: what torch writes in place of a storage."""

    def __init__(self, *identity):
        self.identity = identity


class Tensor:
    """Pickles to a call of what rebuilds a tensor."""

    def __init__(self, *arguments, function=_rebuild_tensor_v2):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, Reference) else None


def pickled(value) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def storage(*further: Any, kind: Any = torch.FloatStorage, key: Any = "0", count: Any = 6):
    return Reference("storage", kind, key, "cpu", count, *further)


def whole(*arguments, of=None, **how) -> dict[str, Tensor]:
    return {"w": Tensor(storage() if of is None else of, *(arguments or (0, (2, 3), (3, 1))), False, None, **how)}


def as_stream(path: Path, value, *, keys=("0",), count=6, cut=0) -> Path:
    """A file of the older form, by hand."""
    head = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
    body = struct.pack("<q", count) + NUMBERS.numpy().tobytes()
    path.write_bytes(b"".join([*head, pickled(value), pickle.dumps(list(keys), 2), body])[: -cut or None])
    return path


def as_zip(path: Path, value, **further: bytes) -> Path:
    """A file of the newer form, by hand."""
    entries = {"data.pkl": pickled(value), "data/0": NUMBERS.numpy().tobytes(), "version": b"3\n"} | further
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"a/{name}", data)
    return path


@pytest.mark.parametrize("write", [as_stream, as_zip])
@pytest.mark.filterwarnings("ignore")
def test_files_written_by_hand_are_what_torch_load_reads(tmp_path, write):
    of = storage(None) if write is as_stream else storage()
    for places in ((0, (2, 3), (3, 1)), (1, (2,), (4,)), (5, (), ()), (0, (0, 9), (9, 1)), (2, (3, 2), (1, 0))):
        path = write(tmp_path / "file.pth", whole(*places, of=of))
        assert torch.equal(open_container(path).tree["w"].read(), torch.load(path)["w"])


@pytest.mark.parametrize("write", [as_stream, as_zip])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (whole(of=storage(count=-1)), "it has a storage of the type"),
        (whole(of=storage(count=2.0)), "it has a storage of the type"),
        (whole(of=storage(kind=torch.ComplexFloatStorage)), "a storage of the type 'ComplexFloatStorage'"),
        (whole(of=storage(kind="FloatStorage")), "it has a storage of the type"),
        (whole(of=storage(key=0)), "it has a storage of the type"),
        (whole(of=storage(count=2**40)), "is shorter than it says|is longer than the file"),
        (whole(of=Reference("module", "x", "0", "cpu", 6)), "no storage"),
        (whole(of=Reference("storage", torch.FloatStorage)), "no storage"),
        (whole(of=7), "a tensor has no storage"),
        (whole(0, (2, 3), (3,)), "the shape of a tensor cannot be"),
        (whole(0, (1,) * 9, (1,) * 9), "the shape of a tensor cannot be"),
        (whole(-1, (2,), (1,)), "the shape of a tensor cannot be"),
        (whole(0, (-2,), (1,)), "the shape of a tensor cannot be"),
        (whole(0, (2,), (-1,)), "the shape of a tensor cannot be"),
        (whole(0, (True,), (1,)), "the shape of a tensor cannot be"),
        (whole(0, [2], (1,)), "the shape of a tensor cannot be"),
        (whole(1, (2, 3), (3, 1)), "reaches past the end of its storage"),
        (whole(0, (2, 3), (4, 1)), "reaches past the end of its storage"),
        (whole(7, (), ()), "reaches past the end of its storage"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_with_the_reason(tmp_path, write, value, reason):
    with pytest.raises(CheckpointError, match=rf"file\.pth .*({reason})"):
        open_container(write(tmp_path / "file.pth", value))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": whole(of=storage(("x", 0, 6)))}, "a view of a storage, as torch wrote before 0.4"),
        ({"keys": ()}, "1 storages are missing"),
        ({"keys": ("1",)}, "a storage is missing"),
        ({"keys": (0,)}, "a storage is missing"),
        ({"keys": ("0", "0")}, "a storage is missing"),
        ({"count": 5}, "a storage is missing"),
        ({"cut": 1}, "a storage ends past the end of the file"),
        ({"cut": 26}, "a storage is missing"),
    ],
)
def test_a_stream_whose_storages_are_not_those_of_its_tensors_is_refused(tmp_path, change, reason):
    path = as_stream(tmp_path / "file.pth", **({"value": whole()} | change))
    with pytest.raises(CheckpointError, match=rf"file\.pth .*{reason}"):
        open_container(path)


def test_a_zip_of_another_byte_order_and_one_that_lacks_a_storage_are_refused(tmp_path):
    assert open_container(as_zip(tmp_path / "little.pth", whole(), byteorder=b"little")).tree
    with pytest.raises(CheckpointError, match="written on a big-endian machine"):
        open_container(as_zip(tmp_path / "big.pth", whole(), byteorder=b"big"))
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        open_container(as_zip(tmp_path / "none.pth", whole(of=storage(key="1"))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_a_tensor_whose_storage_has_no_type_is_read_in_its_own(tmp_path, dtype):
    untyped = storage(kind=torch.UntypedStorage, count=24)
    value = {"w": Tensor(untyped, 1, (2,), (1,), False, None, dtype, function=_rebuild_tensor_v3)}
    ref = open_container(as_zip(tmp_path / "file.pth", value)).tree["w"]
    assert ref.dtype == dtype
    assert torch.equal(ref.read(), NUMBERS.view(dtype)[1:3])
    value["w"].arguments = (*value["w"].arguments[:6], torch.complex64)
    with pytest.raises(CheckpointError, match="no storage or no known type"):
        open_container(as_zip(tmp_path / "other.pth", value))


def ref(*shape: int, dtype: torch.dtype = torch.float32, made: Any = None) -> TensorRef:
    """A tensor of zeros; `made` learns that it was read."""

    def read() -> torch.Tensor:
        if made is not None:
            made.append(shape)
        return torch.zeros(shape, dtype=dtype)

    return TensorRef(dtype, shape, read)


def test_tensors_are_read_where_together_they_are_no_larger_than_their_file(tmp_path):
    made: list[tuple[int, ...]] = []
    refs = {"a": ref(2, 3, made=made), "b": ref(dtype=torch.float64, made=made), "c": ref(0, 5, made=made)}
    assert [value.nbytes for value in refs.values()] == [24, 8, 0]
    with pytest.raises(
        CheckpointError, match=r"x is 31 bytes long but its tensors would take 32; no honest checkpoint"
    ):
        read_all(refs, 31, Path("x"))
    assert made == []
    found = read_all(refs, 32, Path("x"))
    assert shapes_of(found) == {"a": (2, 3), "b": (), "c": (0, 5)}
    assert made == [(2, 3), (), (0, 5)]


def test_twice_the_tensors_have_to_fit_the_machine(monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=2**30))
    huge = {"a": ref(2**27)}
    with pytest.raises(CheckpointError, match=r"^x needs 1\.0 GB of memory, this machine has 1\.0$"):
        read_all({**huge, "b": ref(1)}, 2**40, Path("x"))
    check_memory(2**30, Path("x"))
    with pytest.raises(CheckpointError, match=r"needs 2\.5 GB of memory, this machine has 1\.0$"):
        check_memory(5 * 2**29, Path("x"))


def test_a_digest_is_that_of_all_files_in_a_row(tmp_path):
    from hashlib import sha256

    large = bytes(range(256)) * 5000  # more than a block
    (tmp_path / "a").write_bytes(large)
    (tmp_path / "b").write_bytes(b"end")
    both = Contents(Path("x"), (tmp_path / "a", tmp_path / "b"), "two files", {})
    assert digest(both.files) == sha256(large + b"end").hexdigest()
    assert both.nbytes == len(large) + 3
    assert digest(()) == sha256().hexdigest()


def test_three_names_are_told_and_whether_there_are_more():
    assert some(["a"]) == "a"
    assert some(["a", "b\n", "c"]) == "a, b\\n, c"
    assert some(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert some(["n" * 70]) == "n" * 60


def module_of(name: str = "torch.nn.Module", state: Any = None, **held: Any) -> Stub:
    tables = {kind: held.pop(kind, {}) for kind in ("_parameters", "_modules", "_buffers")}
    return Stub(name, state=state or {**tables, **held})


def test_attributes_are_those_of_a_state_with_slots_or_without():
    assert attributes(module_of(eps=1)).get("eps") == 1
    assert attributes(Stub("x", state=({"eps": 1}, {"slot": 2}))) == {"eps": 1}
    assert attributes(Stub("x", state=({"eps": 1}, {}, 3))) == {}
    assert attributes(Stub("x", state=[1])) == {}
    assert attributes(Stub("x")) == {}


@pytest.mark.parametrize(
    ("value", "module"),
    [
        (module_of(), True),
        (Stub("__torch__.vit", state=7), True),
        (Stub("__torch__", state={}), False),
        (Stub("x", state={"_parameters": {}}), False),
        (Stub("x", state={"_modules": {}}), False),
        ({"_parameters": {}, "_modules": {}}, False),
    ],
)
def test_a_module_is_a_stub_that_holds_parameters_and_modules(value, module):
    assert is_module(value) == module


def test_every_part_has_its_dotted_name_and_what_it_holds_itself():
    inner = module_of("Inner", _parameters={"weight": ref(1), "bias": None, 3: ref(2)}, _buffers={"kept": ref(3)})
    scripted = Stub("__torch__.Scripted", state={"table": ref(5), "eps": 1e-6, "below": inner})
    whole = module_of("Whole", _modules={"a": inner, "s": scripted, "none": None}, _buffers={"gone": ref(4)})
    whole.state["_non_persistent_buffers_set"] = ["gone"]
    assert {name: stub.name for name, stub, _ in parts(whole)} == {
        "": "Whole",
        "a.": "Inner",
        "s.": "__torch__.Scripted",
        "s.below.": "Inner",
    }
    assert {name: value.shape for name, value in state_dict(whole).items()} == {
        "a.weight": (1,),
        "a.kept": (3,),
        "s.table": (5,),
        "s.below.weight": (1,),
        "s.below.kept": (3,),
    }


def test_parts_are_counted_before_they_are_gone_through():
    table = {str(index): None for index in range(MOST_PARTS - 1)}
    assert len(list(parts(module_of(_parameters=table)))) == 1
    with pytest.raises(
        CheckpointError, match=f"the pickled module has more than {MOST_PARTS} parts, so it is not read"
    ):
        list(parts(module_of(_parameters=table | {"one more": None})))


def test_of_several_pickles_in_a_zip_the_one_with_the_shortest_name_is_read(tmp_path):
    path = as_zip(tmp_path / "file.pth", whole(), **{"code/data.pkl": pickled("another")})
    assert open_container(path).tree.keys() == {"w"}
    assert open_container(path).container == "PyTorch file"


@pytest.mark.filterwarnings("ignore")
def test_a_stream_that_becomes_shorter_is_noticed_when_it_is_read(tmp_path):
    path = as_stream(tmp_path / "file.pth", whole(of=storage(None)))
    opened = open_container(path)
    assert opened.container == "PyTorch file (before 1.6)"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged: it refers past the end of a storage"):
        opened.tree["w"].read()
