"""Zip files read as `zipfile` reads them, and refused wherever the directory and the file tell two things."""

import struct
import zipfile
from dataclasses import replace

import pytest

from kcrprune.containers import stored_zip
from kcrprune.containers.stored_zip import ENTRY, LOCAL, StoredZip, open_stored_zip
from kcrprune.errors import CheckpointError

CONTENT = {"a/data.pkl": b"the pickle", "a/data/0": bytes(range(256)), "empty": b""}


@pytest.fixture
def path(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.zip", "w") as archive:
        for name, data in CONTENT.items():
            archive.writestr(name, data)
    return tmp_path / "file.zip"


def wide(path):
    """The same with zip64 fields, as files beyond 4 GB have them: sizes and places of 2**32 - 1 stand further on."""
    data, directory = bytearray(path.read_bytes()), b""
    end = data.rindex(stored_zip.END)
    start, count = struct.unpack_from("<I", data, end + 16)[0], len(CONTENT)
    position = start
    for _ in range(count):
        fixed = bytearray(data[position : position + 46])
        packed, size, name_size = struct.unpack_from("<IIH", fixed, 20)
        (place,) = struct.unpack_from("<I", fixed, 42)
        other = struct.pack("<HHI", 0x5455, 4, 0)  # a field of another kind before it
        extra = other + struct.pack("<HHQQQ", 1, 24, size, packed, place)
        struct.pack_into("<IIHH", fixed, 20, 2**32 - 1, 2**32 - 1, name_size, len(extra))
        struct.pack_into("<I", fixed, 42, 2**32 - 1)
        directory += fixed + data[position + 46 : position + 46 + name_size] + extra
        position += 46 + name_size
    body = bytes(data[:start]) + directory
    end64 = stored_zip.END64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = stored_zip.LOCATOR64 + struct.pack("<IQI", 0, len(body), 1)
    last = stored_zip.END + struct.pack("<HHHHIIH", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(body + end64 + locator + last)


@pytest.mark.parametrize("change", [lambda path: None, wide], ids=["plain", "zip64"])
def test_entries_are_those_of_zipfile(path, change):
    change(path)
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
    found = open_stored_zip(path)
    assert {name: bytes(found.read(name)) for name in found.entries} == CONTENT
    assert found.read("a/data/0", 7, 5) == CONTENT["a/data/0"][7:12]
    assert found.read("a/data/0", 250) == CONTENT["a/data/0"][250:]
    assert found.read("a/data/0", 256, 0) == b""


def test_a_comment_behind_the_directory_is_passed_over(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of somebody" * 100
    assert open_stored_zip(path).read("a/data.pkl") == CONTENT["a/data.pkl"]


@pytest.mark.parametrize(("first", "size"), [(-1, 2), (0, -1), (0, 257), (256, 1), (257, None)])
def test_no_read_leaves_its_entry(path, first, size):
    with pytest.raises(CheckpointError, match="refers past the end of its entry 'a/data/0'"):
        open_stored_zip(path).read("a/data/0", first, size)


def patched(path, where, offset, form, *numbers):
    """Writes numbers behind the first place of some bytes."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(where) + offset, *numbers)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("where", "offset", "form", "value", "reason"),
    [
        (stored_zip.END, 10, "<H", (60_000,), "its directory does not fit"),
        (stored_zip.END, 12, "<I", (2**31,), "its directory does not fit"),
        (stored_zip.END, 10, "<H", (4,), "an entry of its directory is missing"),
        (stored_zip.END, 0, "<I", (0,), "its end is missing"),
        (ENTRY, 42, "<I", (5,), "an entry is missing"),
        (ENTRY, 20, "<II", (10_000, 10_000), "an entry reaches past its end"),
        (LOCAL, 26, "<H", (2**16 - 1,), "an entry reaches past its end"),
    ],
)
def test_a_directory_that_contradicts_its_file_is_refused(path, where, offset, form, value, reason):
    patched(path, where, offset, form, *value)
    with pytest.raises(CheckpointError, match=rf"file\.zip is a damaged or cut zip file: {reason}"):
        open_stored_zip(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("empty", b"not")
    with pytest.raises(CheckpointError, match="the name 'empty' appears twice"):
        open_stored_zip(path)


def test_entries_that_lie_on_each_other_are_refused(path):
    """A small file whose entries are one large one over and over would be a bomb."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0", bytes(5000))
    data = path.read_bytes()
    start, end = data.index(ENTRY), data.index(stored_zip.END)
    copies = b"".join(data[start : end - 1] + name for name in (b"0", b"1"))  # the name stands last
    last = bytearray(data[end:])
    struct.pack_into("<HHI", last, 8, 2, 2, len(copies))
    path.write_bytes(data[:start] + copies + last)
    with pytest.raises(CheckpointError, match="its entries are larger than the file"):
        open_stored_zip(path)


def test_an_encrypted_entry_and_a_file_that_shrinks_are_refused(path):
    patched(path, ENTRY, 8, "<H", 1)
    with pytest.raises(CheckpointError, match=r"its entry 'a/data\.pkl' is compressed"):
        open_stored_zip(path).read("a/data.pkl")
    found = open_stored_zip(path)
    last = max(found.entries.values(), key=lambda entry: entry.offset + entry.size)
    beyond = StoredZip(path, {"x": replace(last, offset=path.stat().st_size - 3, size=10)})
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        beyond.read("x")
