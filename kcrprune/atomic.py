"""Files and folders that are either whole or absent."""

import os
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from zlib import crc32

import psutil

from kcrprune.errors import KcrPruneError, OutputExistsError

LEFTOVER: Final = ".kcrprune-"  # begins the names of temporary files and folders; they end in .part


def write_atomically(path: Path, write: Callable[[Path], object], *, replace: bool = False, needed: int = 0) -> None:
    """Has `write` fill a temporary file in the folder of `path`, then gives it that name in one step.

    A failed or interrupted write leaves nothing at `path`. Missing folders are made and the umask decides the mode.
    OutputExistsError where `path` is taken, unless `replace` says that the old file is to be superseded. KcrPruneError
    where the disk has no room for the `needed` bytes, before anything is written.
    """
    path = Path(path)
    if not replace and (path.exists() or path.is_symlink()):
        raise OutputExistsError(taken(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_room(path, needed)
        temporary = _create(path)
    except OSError as error:
        raise KcrPruneError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # a writer may have replaced the file by one of its own mode
        _flush(temporary)
        _publish(temporary, path, replace=replace)
        _flush(path.parent)
    except OSError as error:
        raise KcrPruneError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder_atomically(path: Path, fill: Callable[[Path], object], *, needed: int = 0) -> None:
    """Has `fill` put files into a temporary folder beside `path`, then gives it that name in one step.

    What was left half done at `path` is replaced. KcrPruneError where the disk has no room for the `needed` bytes.
    """
    require_room(path, needed)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        fill(temporary)
        for part in (*temporary.rglob("*"), temporary):
            _flush(part)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise KcrPruneError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_room(path: Path, needed: int) -> None:
    """KcrPruneError where fewer than `needed` bytes are free on the disk of `path`, whose folder is there."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise KcrPruneError(
            f"cannot write {path}: it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there; make "
            "room, or choose a place on another disk"
        )


def taken(path: Path) -> str:
    """The sentence that says that an output path is in use."""
    return f"{path} exists already and nothing is overwritten; choose another path or remove it"


def _create(path: Path) -> Path:
    """A new empty file beside `path`; unlike `tempfile`, it has the mode that the umask gives."""
    temporary = _temporary(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _temporary(path: Path) -> Path:
    """A free name beside `path` that tells whose it is; what dead processes of this host left for `path` is removed.

    It is short, whatever the name of `path`.
    """
    host, name = (crc32(os.fsencode(text)) for text in (socket.gethostname(), path.name))
    stem = f"{LEFTOVER}{name:08x}-{host:08x}-"
    for left in path.parent.glob(f"{stem}*.part"):
        process = left.name.removeprefix(stem).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            remove(left)
    return path.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(3)}.part")


def remove(path: Path) -> None:
    """A file or a folder is gone, as far as the system lets it go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _publish(temporary: Path, path: Path, *, replace: bool) -> None:
    if replace:
        temporary.replace(path)
        return
    try:
        path.hardlink_to(temporary)  # unlike a rename, fails where somebody took the name meanwhile
    except FileExistsError as error:
        raise OutputExistsError(taken(path)) from error
    except OSError:  # a file system without hard links
        temporary.rename(path)


def _flush(path: Path) -> None:
    if os.name == "posix" or path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
