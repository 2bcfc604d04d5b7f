"""A file, or a folder, is either whole or absent."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kcrprune.atomic import LEFTOVER, _temporary, make_folder_atomically, remove, require_room, write_atomically
from kcrprune.errors import KcrPruneError, OutputExistsError


def test_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("replace", [False, True])
def test_failed_write_changes_nothing(tmp_path, error, replace):
    path = tmp_path / "file.txt"
    if replace:
        path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises((KeyboardInterrupt, ValueError, KcrPruneError)):
        write_atomically(path, write, replace=replace)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("file.txt", "old")] if replace else [])


def test_full_disk_is_one_sentence(tmp_path):
    def write(temporary):
        raise OSError(28, "No space left on device")

    with pytest.raises(KcrPruneError, match=r"cannot write .*file.txt: No space left"):
        write_atomically(tmp_path / "file.txt", write)


def test_a_taken_path_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OutputExistsError, match=r"file.txt exists already"):
        write_atomically(path, lambda temporary: pytest.fail("it was written"))
    assert path.read_text() == "old"


def test_a_path_taken_meanwhile_is_refused(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary):
        temporary.write_text("new")
        path.write_text("somebody else's")

    with pytest.raises(OutputExistsError):
        write_atomically(path, write)
    assert path.read_text() == "somebody else's"


def test_replaces_when_told_to(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    write_atomically(path, lambda temporary: temporary.write_text("new"), replace=True)
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_umask_decides_the_mode_even_where_the_writer_has_its_own(tmp_path, umask, mode):
    def write(temporary):  # as safetensors does: another file takes the name
        other = temporary.with_suffix(".other")
        other.write_text("x")
        other.chmod(0o600)
        other.replace(temporary)

    old = os.umask(umask)
    try:
        write_atomically(tmp_path / "file.txt", write)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KcrPruneError, match="cannot write"):
        write_atomically(tmp_path / "file" / "below", lambda temporary: None)


def test_a_folder_appears_with_everything_in_it(tmp_path):
    def fill(folder):
        assert not (tmp_path / "new").exists()
        (folder / "below").mkdir()
        (folder / "below" / "file.txt").write_text("whole")

    make_folder_atomically(tmp_path / "new", fill)
    assert (tmp_path / "new" / "below" / "file.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path, error):
    def fill(folder):
        (folder / "file.txt").write_text("half")
        raise error

    with pytest.raises((KeyboardInterrupt, ValueError, KcrPruneError)):
        make_folder_atomically(tmp_path / "new", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["touch", "mkdir"])
def test_what_a_killed_process_left_for_the_same_name_is_swept_and_nothing_else(tmp_path, kind):
    code = "import sys, pathlib, kcrprune.atomic as a; "
    code += f"[a._temporary(pathlib.Path(name)).{kind}() for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.onnx", tmp_path / "n.onnx"], check=True)
    others = list(tmp_path.iterdir())
    alive = _temporary(tmp_path / "m.onnx")  # sweeps
    [other] = tmp_path.iterdir()
    [left] = set(others) - {other}
    elsewhere, mine = tmp_path / f"{left.name[:19]}0badhost-1-a.part", tmp_path / ".m.part"
    for file in (alive, elsewhere, mine):
        file.touch()
    write_atomically(tmp_path / "m.onnx", lambda file: file.write_text("whole"))
    assert set(tmp_path.iterdir()) == {other, alive, elsewhere, mine, tmp_path / "m.onnx"}


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    write_atomically(tmp_path / ("n" * 255), lambda file: file.write_text("whole"))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_file_system_without_hard_links_gets_the_file_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    write_atomically(tmp_path / "file.txt", lambda temporary: temporary.write_text("whole"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.txt", "whole")]


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX")
@pytest.mark.parametrize("replace", [True, False])
def test_a_file_and_its_name_are_on_the_disk_before_it_is_told_of(tmp_path, monkeypatch, replace):
    flushed, path = [], tmp_path / "file.txt"
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, path.exists())))
    write_atomically(path, lambda temporary: temporary.write_text("whole"), replace=replace)
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX")
def test_a_folder_and_all_in_it_are_on_the_disk_before_it_is_told_of(tmp_path, monkeypatch):
    flushed, path = [], tmp_path / "new"
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, path.exists())))
    make_folder_atomically(path, lambda folder: (folder / "file.txt").write_text("whole"))
    files, last = flushed[:-1], flushed[-1]
    assert set(files) == {(part.stat().st_ino, False) for part in (path, path / "file.txt")}
    assert last == (tmp_path.stat().st_ino, True)


def test_a_disk_without_room_is_told_of_with_both_figures(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    for make in (write_atomically, make_folder_atomically):
        with pytest.raises(KcrPruneError, match=r"x: it takes 4\.0 MB, and 3\.0 MB are free there"):
            make(tmp_path / "x", lambda path: pytest.fail("nothing is begun"), needed=4_000_000)
    write_atomically(tmp_path / "fits", lambda path: path.write_text(""), needed=3_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder", "link to nothing", "nothing"])
def test_what_is_removed_is_gone_and_what_a_link_leads_to_stays(tmp_path, kind):
    path, other = tmp_path / "x", tmp_path / "other"
    (other / "below").mkdir(parents=True)
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        (path / "below").mkdir(parents=True)
        (path / "below" / "file").write_text("x")
    elif kind != "nothing":
        path.symlink_to(other if kind == "link to a folder" else "nowhere")
    remove(path)
    assert not path.is_symlink()
    assert not path.exists()
    assert (other / "below").is_dir()


@pytest.mark.parametrize("target", ["file", "nothing"])
def test_a_name_that_is_a_link_is_taken_wherever_it_leads(tmp_path, target):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OutputExistsError, match=r"link exists already and nothing is overwritten; choose another path"):
        write_atomically(tmp_path / "link", lambda temporary: pytest.fail("it was written"))
    write_atomically(tmp_path / "link", lambda temporary: temporary.write_text("new"), replace=True)
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_replaces_what_was_left_there(tmp_path):
    (tmp_path / "new" / "below").mkdir(parents=True)
    (tmp_path / "new" / "below" / "half").write_text("half")
    make_folder_atomically(tmp_path / "new", lambda folder: (folder / "file").write_text("whole"))
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["new", "new/file"]


@pytest.mark.parametrize("make", [write_atomically, make_folder_atomically])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("of no number")])
def test_the_words_of_the_system_are_told_or_else_those_of_the_error(tmp_path, make, error):
    def fail(_):
        raise error

    with pytest.raises(
        KcrPruneError, match=rf"^cannot write {tmp_path / 'x'}: (No space left on device|of no number)$"
    ):
        make(tmp_path / "x", fail)
    assert not list(tmp_path.iterdir())


def test_a_temporary_name_is_hidden_and_new_each_time_and_in_the_folder_of_what_it_becomes(tmp_path):
    names = {_temporary(tmp_path / "model.safetensors") for _ in range(20)}
    assert len(names) == 20
    for name in names:
        assert name.parent == tmp_path
        assert name.name.startswith(LEFTOVER)
        assert name.name.startswith(".")
        assert name.suffix == ".part"
        assert f"-{os.getpid()}-" in name.name
    stems = {_temporary(tmp_path / name).name[: len(LEFTOVER) + 8] for name in ("a", "b")}
    assert len(stems) == 2, "another name has another stem, so that its leftovers are not swept"


def test_room_is_asked_for_on_the_disk_of_the_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or shutil._ntuple_diskusage(9, 1, 8))
    require_room(tmp_path / "not yet", 8)
    with pytest.raises(KcrPruneError, match="make room, or choose a place on another disk"):
        require_room(tmp_path / "not yet", 9)
    assert asked == [tmp_path, tmp_path]


def test_what_looks_like_a_leftover_and_names_no_process_stays(tmp_path):
    stem = _temporary(tmp_path / "x").name.rpartition(f"{os.getpid()}-")[0]
    for name in (f"{stem}mine-1.part", f"{stem}.part", f"{stem}{2**22 + 7}-1.part"):
        (tmp_path / name).touch()
    _temporary(tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}mine-1.part", f"{stem}.part"}
