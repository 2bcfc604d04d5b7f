"""Torch files: the same tensors as torch.load, and nothing from a file that is cut, bent or packed."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from kcrprune.artifact.artifact import open_model
from kcrprune.containers.container import open_container
from kcrprune.containers.contents import check_memory, read_all
from kcrprune.containers.modules import state_dict
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
