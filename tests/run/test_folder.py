"""Whose folder a run's is: nothing of others is touched, nothing finished is lost, and no two share one."""

import os
import subprocess
import sys

import pytest

from kcrprune.artifact.artifact import MODEL_FILE
from kcrprune.config import RunConfig
from kcrprune.errors import CheckpointError, ConfigError, OutputExistsError
from kcrprune.run import folder as folders
from kcrprune.run import lock
from kcrprune.run.folder import ASKED, RECORD, REPORT, RUNS, STORE, Asked, candidates, require_usable, taken

ASKED_FOR = Asked.of("checkpoint", "images", RunConfig())
OTHER = Asked.of("checkpoint", "images", RunConfig(lr=1.0))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def stopped(folder, asked=ASKED_FOR):
    """A run whose process died after its first stage."""
    (folder / STORE / "dense-0123").mkdir(parents=True)
    asked.write(folder)
    return folder


def done(folder, asked=ASKED_FOR):
    stopped(folder, asked)
    for name in (MODEL_FILE, RECORD):
        (folder / name).write_text("{}")
    return folder


def take(out=None, asked=ASKED_FOR, *, fresh=False):
    return taken(candidates(out, "vit-0.7", asked, fresh=fresh))


def fail(out, *kept):
    """Fails in a run's folder after it has kept the results of some stages."""
    with take(out) as folder:
        ASKED_FOR.write(folder)
        for name in kept:
            (folder / STORE / name).mkdir()
        raise ZeroDivisionError


def dead():
    """A process that no longer runs, as an owner."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = lock.Owner.me().model_copy(update={"pid": child.pid})
    child.communicate(b"\n")
    return found


def locked_by(owner, folder, number=1):
    (folder / f"{lock.NAME}.{number}").write_text(owner.model_dump_json())


def test_two_runs_at_once_have_folders_of_their_own():
    with take() as first, take() as second:
        assert (first, second) == (RUNS / "vit-0.7", RUNS / "vit-0.7-2")


def test_a_run_goes_on_where_its_owner_is_dead_and_elsewhere_where_he_lives(here):
    run = stopped(RUNS / "vit-0.7")
    locked_by(dead(), run / STORE)
    with take() as folder, take() as other:
        assert folder == run
        assert other == RUNS / "vit-0.7-2"
    with take(fresh=True) as folder:
        assert folder not in (run, RUNS / "vit-0.7")
    with take(asked=OTHER) as folder:
        assert folder != run


def test_of_several_the_newest_goes_on():
    for name, when in (("a", 1), ("b", 3), ("c", 2)):
        os.utime(stopped(RUNS / name) / STORE / ASKED, (when, when))
    with take() as folder:
        assert folder.name == "b"


def test_the_same_folder_is_refused_while_somebody_works_in_it(here):
    out = here / "run"
    with take(out):
        with pytest.raises(OutputExistsError, match=f"process {os.getpid()} on .* works in {out}"):
            require_usable(out)
        with pytest.raises(OutputExistsError, match="works in"), take(out):
            pass
    locked_by(lock.Owner.me().model_copy(update={"host": "elsewhere"}), stopped(out) / STORE)
    with pytest.raises(OutputExistsError, match=r"on elsewhere works in .*a dead process has left lies in"):
        require_usable(out)


def test_a_process_that_is_a_later_one_of_the_same_number_is_not_the_owner(here):
    me = lock.Owner.me()
    assert me.alive
    assert not me.model_copy(update={"started": me.started - 60}).alive


def test_one_of_two_gets_the_lock_of_a_dead_process(here, monkeypatch):
    locked_by(dead(), here)
    seen = lock._locks(here)
    monkeypatch.setattr(lock, "_locks", lambda folder: seen)  # both have looked before either takes
    first, second = lock.take(here), lock.take(here)
    assert first == here / "lock.2"
    assert second is None
    assert not (here / "lock.1").exists()


def test_a_finished_run_is_for_looking_at(here):
    for out in (None, RUNS / "vit-0.7"):
        before = tree(done(RUNS / "vit-0.7") if out is None else RUNS)
        with take(out) as folder:
            assert folders.finished(folder)
        assert tree(RUNS / "vit-0.7").items() >= before.items() or tree(RUNS) == before
    with pytest.raises(OutputExistsError, match="holds a finished run that differs in lr; choose another --out"):
        take(RUNS / "vit-0.7", OTHER).__enter__()
    with pytest.raises(OutputExistsError, match="not empty"):
        require_usable(RUNS / "vit-0.7", fresh=True)
    with take(asked=OTHER) as folder:
        assert folder == RUNS / "vit-0.7-2"


def test_what_fails_before_anything_is_kept_leaves_nothing(here):
    for out in (here / "a" / "b" / "run", None):
        with pytest.raises(ZeroDivisionError):
            fail(out)
        assert not list(here.iterdir())


def test_what_fails_later_leaves_what_is_kept(here):
    with pytest.raises(ZeroDivisionError):
        fail(here / "run", "dense-0123")
    assert {path.name for path in (here / "run" / STORE).iterdir()} == {ASKED, "dense-0123"}


@pytest.mark.parametrize("way", ["empty", "link", "dot"])
def test_an_empty_folder_is_used_as_it_is(here, way, monkeypatch):
    (here / "real").mkdir()
    (here / "link").symlink_to("real")
    if way == "dot":
        monkeypatch.chdir("real")
    out = {"empty": here / "real", "link": here / "link", "dot": folders.Path()}[way]
    before = (here / "real").stat().st_ino
    with pytest.raises(ZeroDivisionError):
        fail(out)
    assert not list((here / "real").iterdir())
    with take(out) as folder:
        stopped(folder)
    assert (here / "real").stat().st_ino == before
    assert (here / "real" / STORE / ASKED).is_file()
    assert (here / "link").is_symlink()


@pytest.mark.parametrize("way", ["file", "dangling", "full", "own stages"])
def test_what_belongs_to_others_is_refused_and_stays(here, way):
    out = here / "out"
    if way == "file":
        out.write_text("mine")
    elif way == "dangling":
        out.symlink_to("nowhere")
    else:
        (out / ("stages" if way == "own stages" else "")).mkdir(parents=True)
        (out / ("stages" if way == "own stages" else "") / "notes.txt").write_text("mine")
    before = tree(here)
    for check in (lambda: require_usable(out), lambda: take(out).__enter__()):
        with pytest.raises(OutputExistsError, match="choose another --out"):
            check()
    assert tree(here) == before


def test_a_name_that_cannot_be_is_refused_and_leaves_no_parent(here):
    for out in (here / "new" / ("n" * 300), here / "new" / ("n" * 300) / "run"):
        with pytest.raises(OutputExistsError, match="File name too long; choose another --out"):
            take(out).__enter__()
    with pytest.raises(OutputExistsError, match="File name too long; choose another --out"):
        require_usable(here / ("n" * 300))
    with pytest.raises(OutputExistsError, match="File name too long"):
        taken(folders.new_folders("n" * 300)).__enter__()
    (here / "file").write_text("")
    with pytest.raises(OutputExistsError, match="cannot write to"):
        take(here / "file" / "run").__enter__()
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_name_that_is_not_utf_8_is_refused_before_anything_costs(here):
    out = here / os.fsdecode(b"run\xff")
    for check in (lambda: require_usable(out), lambda: take(out).__enter__()):
        with pytest.raises(ConfigError, match=r"is no UTF-8, .*; choose another --out"):
            check()
    assert not list(here.iterdir())


def test_a_name_that_appears_meanwhile_is_left_alone(here):
    (here / "a").mkdir()
    with taken([(here / "a", True), (here / "b", True)]) as folder:
        assert folder == here / "b"
    with pytest.raises(OutputExistsError, match="another process took"), taken([(here / "a", True)]):
        pass


def test_the_newest_model_is_that_of_a_finished_run_in_a_folder_that_shows(here):
    with pytest.raises(CheckpointError, match="no run of kcrprune lies below"):
        folders.newest_model(here)
    done(here / ".run.abcdefgh.partial")
    (stopped(here / "b") / MODEL_FILE).write_text("")
    with pytest.raises(CheckpointError, match="no run of kcrprune lies below"):
        folders.newest_model(here)
    run = done(here / "a")
    assert folders.newest_model(here) == run / MODEL_FILE


def test_a_half_written_stage_of_a_stopped_run_is_cleared_away(here):
    run = stopped(here / "run")
    half, report = run / STORE / ".kcrprune-0-1-2-3.part", run / ".kcrprune-0-1-2-4.part"
    half.mkdir()
    report.write_text("")
    (run / ".mine.part").write_text("")
    with take(run):
        assert not half.exists()
        assert not report.exists()
        assert (run / ".mine.part").exists()
        assert (run / STORE / "dense-0123").is_dir()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', '{"pid": 1, "started": 1, "host": "x", "of_tomorrow": 1}'])
def test_a_lock_that_cannot_be_read_counts_as_somebodys(here, text):
    run = stopped(RUNS / "vit-0.7")
    (run / STORE / "lock.1").write_text(text)
    with pytest.raises(OutputExistsError, match=r"process 0 on an unknown host works in .* lies in"):
        require_usable(run)
    with take() as folder:
        assert folder == RUNS / "vit-0.7-2"
    assert (run / STORE / "lock.1").read_text() == text


@pytest.mark.parametrize("name", [REPORT, RECORD])
@pytest.mark.parametrize("text", [None, "", "[]", '{"speed": 7}', '{"before": {}}'])
def test_a_finished_run_that_is_damaged_is_told_of_and_stays(here, name, text):
    run = done(here / "run")
    if text is None:
        (run / name).unlink(missing_ok=True)
    else:
        (run / name).write_text(text)
    show = folders.comparison if name == REPORT else folders.speed
    if name == RECORD and text == '{"before": {}}':
        assert show(run) is None, "no time was measured"
        return
    with pytest.raises(OutputExistsError, match=rf"holds a finished run whose {name} is missing or damaged"):
        show(run)


def test_what_two_runs_were_asked_differs_by_the_names_of_settings():
    assert ASKED_FOR.differences(OTHER) == ["lr"]
    assert ASKED_FOR.differences(ASKED_FOR) == []
    others = Asked.of("another", "others", RunConfig(lr=1.0, workers=7))
    assert others.differences(ASKED_FOR) == ["the checkpoint", "the images", "lr"]


def test_a_run_beside_another_one_finds_those_of_its_checkpoint_alone(here):
    for number, (name, asked) in enumerate(
        {"a": ASKED_FOR, "b": OTHER, "c": Asked.of("another", "images", RunConfig())}.items()
    ):
        os.utime(stopped(here / name, asked) / STORE / ASKED, (number, number))
    (here / "file").write_text("")
    found = folders.relatives(here / "new", ASKED_FOR)
    assert list(found.items()) == [
        (here / "b" / STORE, "b (which differs in lr)"),
        (here / "a" / STORE, "a (which was asked the same)"),
    ]
    assert here / "a" / STORE not in folders.relatives(here / "a", ASKED_FOR)
