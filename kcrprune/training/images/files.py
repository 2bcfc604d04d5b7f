"""Which files below a folder, or inside a tar file, are images, and which were passed over."""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import SEEK_CUR, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, Final

from PIL import Image
from timm.utils.misc import natural_key

from kcrprune.errors import DataError
from kcrprune.training.images.decode import first_line

STUBS: Final = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # what Pillow recognises and cannot draw by itself


class _Member(RawIOBase):
    """A file inside a tar file, of which no more is read than asked for; it knows its name as other files do."""

    def __init__(self, archive: Path, name: str, start: int, size: int) -> None:
        self.name, self.start, self.size, self.position = f"{archive}/{name}", start, size, 0
        self.archive = archive.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        origin = 0 if whence == SEEK_SET else self.position if whence == SEEK_CUR else self.size
        self.position = max(0, origin + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.archive.seek(self.start + self.position)
        read = self.archive.readinto(memoryview(buffer)[: max(0, self.size - self.position)]) or 0
        self.position += read
        return read

    def close(self) -> None:
        self.archive.close()
        super().close()


@dataclass(frozen=True)
class Files:
    """Image files by their path below `root`, in natural order; `members` says where each begins in a tar file."""

    root: Path
    names: Sequence[str]
    passed_over: Mapping[str, int] = field(default_factory=dict)  # how many files, by reason
    members: Mapping[str, tuple[int, int]] | None = None  # offset and size in bytes

    def open(self, name: str) -> IO[bytes]:
        """The file, to be read; nothing stays open between two, so processes can share this object."""
        if self.members is None:
            return (self.root / name).open("rb")
        return BufferedReader(_Member(self.root, name, *self.members[name]))

    @property
    def told(self) -> str | None:
        """A sentence about what was passed over; None where that is nothing."""
        if not self.passed_over:
            return None
        ordered = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in ordered)
        return f"{self.root}: {sum(self.passed_over.values()):,} files were passed over ({reasons})"


def image_files(root: Path) -> Files:
    """Those of a folder, links followed, or of a tar file; DataError for what cannot be read or would be read twice."""
    try:
        return _of_tar(root) if root.is_file() else _of_folder(root)
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{root} cannot be read ({first_line(error)}); name a folder or a .tar file of images"
        ) from None


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return _passed_over(name) is None


def class_of(name: str) -> str:
    """The folder directly below the root that a file lies in, at whatever depth; '' for none."""
    folder, _, rest = name.partition("/")
    return folder if rest else ""


def _of_folder(root: Path) -> Files:
    names: list[str] = []
    passed_over: Counter[str] = Counter()
    met: dict[tuple[int, int], str] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        _meet(root / folder, met)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = posixpath.join(folder, entry.name)
                if entry.is_dir() and not entry.name.startswith("."):
                    folders.append(name)
                elif not entry.is_dir() and not entry.is_file():
                    raise DataError(
                        f"{entry.path} is no regular file (a link to nothing, a pipe or a device); remove it"
                    )
                elif reason := _passed_over(entry.name):
                    passed_over[reason] += 1
                else:
                    names.append(name)
    return Files(root, _ordered(names), passed_over)


def _meet(folder: Path, met: dict[tuple[int, int], str]) -> None:
    status = folder.stat()
    before = met.setdefault((status.st_dev, status.st_ino), str(folder))
    if before != str(folder):
        raise DataError(f"{folder} is {before} again, by a link; its images would count twice, so remove the link")


def _of_tar(root: Path) -> Files:
    members: dict[str, tuple[int, int]] = {}
    passed_over: Counter[str] = Counter()
    with tarfile.open(root, "r:") as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if member.isdir():
                continue
            if not member.isfile() or member.issparse():
                passed_over["no regular file"] += 1
            elif reason := _passed_over(name):
                passed_over[reason] += 1
            else:
                members[name] = member.offset_data, member.size
    return Files(root, _ordered(members), passed_over, members)


def _passed_over(name: str) -> str | None:
    """Why a file is none of the images; None if it is one."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    suffix = posixpath.splitext(name)[1].lower()
    return None if suffix in _suffixes() else suffix or "without a suffix"


@cache
def _suffixes() -> frozenset[str]:
    """Those of the formats that Pillow draws."""
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS
    )


def _ordered(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    return sorted(names, key=lambda name: (natural_key(name), name))
