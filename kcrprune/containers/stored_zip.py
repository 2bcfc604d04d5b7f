"""Zip files whose entries are stored, as torch writes them: where each entry lies, checked against the file's size.

A compressed entry is never read: torch compresses no weights (only the code of a TorchScript archive), and
compression is how a small file becomes a large one in memory.
Format: PKWARE APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end).
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kcrprune.errors import CheckpointError

END, END_SIZE = b"PK\5\6", 22
END64, LOCATOR64 = b"PK\6\6", b"PK\6\7"
ENTRY, ENTRY_SIZE = b"PK\1\2", 46
LOCAL, LOCAL_SIZE = b"PK\3\4", 30
MOST_ENTRIES: Final = 50_000  # ours; a training checkpoint of the largest ViT has 2,000


@dataclass(frozen=True)
class Entry:
    """One entry: its `size` bytes begin at `offset` in the file."""

    offset: int
    size: int
    crc: int  # 0: torch was told to write none
    stored: bool  # neither compressed nor encrypted


@dataclass(frozen=True)
class StoredZip:
    """The entries of a zip file by name."""

    path: Path
    entries: Mapping[str, Entry]

    def read(self, name: str, first: int = 0, size: int | None = None) -> bytearray:
        """Some bytes of an entry; its checksum is verified where all of it is read."""
        entry = self.entries[name]
        if not entry.stored:
            raise CheckpointError(
                f"{self.path}: its entry {name[:80]!r} is compressed, which torch never does to weights"
            )
        size = entry.size - first if size is None else size
        if first < 0 or size < 0 or first + size > entry.size:
            raise CheckpointError(f"{self.path} is damaged: it refers past the end of its entry {name[:80]!r}")
        data = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(entry.offset + first)
            if file.readinto(data) != size:
                raise CheckpointError(f"{self.path} became shorter while it was read")
        if size == entry.size and entry.crc and zlib.crc32(data) != entry.crc:
            raise CheckpointError(f"{self.path} is damaged: the checksum of its entry {name[:80]!r} differs")
        return data


def open_stored_zip(path: Path) -> StoredZip:
    """The directory of a zip file; CheckpointError where it is cut short or contradicts itself."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            entries = _entries(file, size)
        except (struct.error, ValueError, LookupError) as error:
            raise CheckpointError(f"{path} is a damaged or cut zip file: {error}") from error
    if sum(entry.size for entry in entries.values()) > size:
        raise CheckpointError(f"{path} is damaged: its entries are larger than the file")
    return StoredZip(path, entries)


def _entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    count, length, start = _directory(file, size)
    if count > MOST_ENTRIES or start + length > size:
        raise ValueError("its directory does not fit")
    directory = _at(file, start, length)
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        name, entry, position = _entry(directory, position)
        if name in entries:
            raise ValueError(f"the name {name[:80]!r} appears twice")
        entries[name] = _located(file, size, entry)
    return entries


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, length and start of the directory."""
    tail_size = min(size, END_SIZE + 2**16)
    tail = _at(file, size - tail_size, tail_size)
    end = tail.rfind(END)
    if end < 0:
        raise ValueError("its end is missing")
    count, length, start = struct.unpack_from("<HII", tail, end + 10)
    locator = tail[max(end - 20, 0) : end]
    if locator.startswith(LOCATOR64):
        (where,) = struct.unpack_from("<Q", locator, 8)
        end64 = _at(file, where, 56)
        if not end64.startswith(END64):
            raise ValueError("its end is missing")
        count, length, start = struct.unpack_from("<QQQ", end64, 32)
    return count, length, start


def _entry(directory: bytes, position: int) -> tuple[str, Entry, int]:
    """Name, entry (with the offset of its local header) and where the next one begins."""
    if directory[position : position + 4] != ENTRY:
        raise ValueError("an entry of its directory is missing")
    flags, method = struct.unpack_from("<HH", directory, position + 8)
    crc, packed, size, name_size, extra_size, comment_size = struct.unpack_from("<IIIHHH", directory, position + 16)
    (offset,) = struct.unpack_from("<I", directory, position + 42)
    begin = position + ENTRY_SIZE
    name = directory[begin : begin + name_size].decode("utf-8")
    extra = directory[begin + name_size : begin + name_size + extra_size]
    size, packed, offset = _wide(extra, size, packed, offset)
    stored = method == 0 and packed == size and not flags & 1
    return name, Entry(offset, packed, crc, stored), begin + name_size + extra_size + comment_size


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """The 64-bit values of the zip64 extra field for those that are 2**32 - 1."""
    fields = b""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == 1:
            fields = extra[4 : 4 + length]
        extra = extra[4 + length :]
    wide = []
    for value in values:
        if value == 2**32 - 1 and fields:
            (value,), fields = struct.unpack_from("<Q", fields), fields[8:]
        wide.append(value)
    return tuple(wide)


def _located(file: BinaryIO, size: int, entry: Entry) -> Entry:
    """The entry with the offset of its bytes in place of that of its local header."""
    header = _at(file, entry.offset, LOCAL_SIZE)
    if not header.startswith(LOCAL):
        raise ValueError("an entry is missing")
    name_size, extra_size = struct.unpack_from("<HH", header, 26)
    begin = entry.offset + LOCAL_SIZE + name_size + extra_size
    if begin + entry.size > size:
        raise ValueError("an entry reaches past its end")
    return Entry(begin, entry.size, entry.crc, entry.stored)


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
