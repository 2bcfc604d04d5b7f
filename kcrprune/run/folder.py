"""The folder of a run: which one it is, who works in it, and what may be done with one that is there.

A folder is a run's own from the moment that nothing cheap can refuse it any more. Files below STORE are the run's
memory; its results appear beside it, whole and one by one, and RECORD comes last: a folder without it is unfinished.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import JsonValue

from kcrprune.artifact.artifact import MODEL_FILE
from kcrprune.atomic import LEFTOVER, remove, write_atomically
from kcrprune.config import RunConfig
from kcrprune.errors import CheckpointError, ConfigError, OutputExistsError
from kcrprune.measure.report import Comparison, Timing
from kcrprune.plan import Frozen
from kcrprune.run import lock
from kcrprune.run.context import FREE

T = TypeVar("T")
RUNS: Final = Path("kcrprune-runs")
STORE: Final = "stages"
ASKED: Final = "asked.json"  # in the store: what the run is asked to do
REPORT: Final = "report.json"
RECORD: Final = "run.json"
RELATIVES: Final = 16  # other runs, at most, that finished stages are looked for in


class Asked(Frozen):
    """What a run is asked to do: two runs that are asked the same give the same."""

    checkpoint: str  # digest
    images: str  # fingerprint
    settings: dict[str, JsonValue]

    @classmethod
    def of(cls, checkpoint: str, images: str, config: RunConfig) -> "Asked":
        """With the settings that change a result."""
        return cls(checkpoint=checkpoint, images=images, settings=config.model_dump(mode="json", exclude=set(FREE)))

    @classmethod
    def read(cls, folder: Path) -> "Asked | None":
        """What the run in a folder was asked; None for any other folder."""
        try:
            return cls.model_validate(_json(folder / STORE / ASKED))
        except (OSError, ValueError):  # pydantic's are among these
            return None

    def write(self, folder: Path) -> None:
        """For the next time that the run is asked for."""
        text = json.dumps(self.model_dump(mode="json"), indent=2)
        write_atomically(folder / STORE / ASKED, lambda file: file.write_text(text, "utf-8"), replace=True)

    def differences(self, other: "Asked") -> list[str]:
        """Names of what is not the same."""
        first, second = (
            {"the checkpoint": asked.checkpoint, "the images": asked.images} | asked.settings for asked in (self, other)
        )
        return [name for name in first | second if first.get(name) != second.get(name)]


def finished(folder: Path) -> bool:
    """Whether everything in a run's folder is there."""
    return (folder / RECORD).is_file()


def comparison(folder: Path) -> Comparison:
    """Before and after of a finished run; OutputExistsError where its report is damaged."""
    return _shown(folder / REPORT, Comparison.model_validate)


def speed(folder: Path) -> Timing | None:
    """How long the network of a finished run takes beside the dense one, if that was measured; as `comparison`."""
    return _shown(folder / RECORD, lambda told: told.get("speed") and Timing.model_validate(told["speed"]))


def _shown(path: Path, read: Callable[[Any], T]) -> T:
    try:
        return read(_json(path))
    except (OSError, ValueError, AttributeError) as error:
        raise OutputExistsError(
            f"{path.parent} holds a finished run whose {path.name} is missing or damaged, so it cannot be shown; "
            "choose another --out, nothing is overwritten"
        ) from error


def _json(path: Path) -> Any:
    """What a file holds; unlike pydantic, Python reads names that are not UTF-8."""
    return json.loads(path.read_bytes())


def require_usable(out: Path, *, fresh: bool = False) -> None:
    """OutputExistsError unless `out` is missing, empty, or a run that nobody works on; `fresh` wants no run there.

    ConfigError for a name that no weights can be written under.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{out} is no UTF-8, as the names of safetensors files are; choose another --out") from None
    try:
        if out.is_symlink() and not out.exists():
            raise OutputExistsError(f"{out} is a link to what is not there; choose another --out")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise OutputExistsError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if fresh or not _is_run(out):
        raise OutputExistsError(f"{out} is already there and not empty; choose another --out, nothing is overwritten")
    if (busy := lock.owner(out / STORE)) is not None:
        raise OutputExistsError(
            f"process {busy.pid} on {busy.host} works in {out}; wait for it, or choose another --out (a lock that a "
            f"dead process has left lies in {out / STORE})"
        )


def _is_run(folder: Path) -> bool:
    """Whether a folder is of our making, however young."""
    beside, inside = ({path.name for path in place.glob("*")} for place in (folder, folder / STORE))
    return ASKED in inside or any(lock.is_lock(name) for name in inside) or (beside == {STORE} and not inside)


def candidates(out: Path | None, name: str, asked: Asked, *, fresh: bool) -> Iterator[tuple[Path, bool]]:
    """Folders that a run may be in, and whether each must be new.

    `out` alone; or, below RUNS, those that were asked the same, the newest first, and then free ones called `name`.
    OutputExistsError where `out` is finished and was asked something else.
    """
    if out is None:
        yield from () if fresh else ((folder, False) for folder in _asked_the_same(asked))
        yield from new_folders(name)
        return
    require_usable(out, fresh=fresh)
    before = Asked.read(out)
    if finished(out) and before != asked:
        others = ", ".join(before.differences(asked)) if before else "what is not known"
        raise OutputExistsError(
            f"{out} holds a finished run that differs in {others}; choose another --out, nothing is overwritten"
        )
    yield out, False


def new_folders(name: str) -> Iterator[tuple[Path, bool]]:
    """Names below RUNS, without end."""
    return ((RUNS / (name if number == 1 else f"{name}-{number}"), True) for number in count(1))


def _asked_the_same(asked: Asked) -> list[Path]:
    runs = RUNS.iterdir() if RUNS.is_dir() else ()
    same = [folder for folder in runs if Asked.read(folder) == asked]
    return sorted(same, key=lambda folder: (folder / STORE / ASKED).stat().st_mtime_ns, reverse=True)


def relatives(folder: Path, asked: Asked) -> dict[Path, str]:
    """The stores of other runs of the same checkpoint beside a folder, the newest first, and what they differ in."""
    found = []
    with suppress(OSError):
        found = [path for path in folder.absolute().parent.iterdir() if (path / STORE / ASKED).is_file()]
    found = [path for path in found if path != folder.absolute()]
    newest = sorted(found, key=lambda path: (path / STORE / ASKED).stat().st_mtime_ns, reverse=True)[:RELATIVES]
    runs = {path: run for path in newest if (run := Asked.read(path)) and run.checkpoint == asked.checkpoint}
    return {path / STORE: f"{path.name} ({_told(run.differences(asked))})" for path, run in runs.items()}


def _told(differences: Sequence[str]) -> str:
    return f"which differs in {', '.join(differences)}" if differences else "which was asked the same"


@contextmanager
def taken(folders: Iterable[tuple[Path, bool]]) -> Iterator[Path]:
    """The first of these folders that is finished, or that becomes this process's own until the block ends.

    A run that fails before it has kept anything leaves nothing behind, no parent folder either.
    """
    for folder, new in folders:
        if not new and finished(folder):
            yield folder
            return
        made: list[Path] = []
        mine = _locked(folder, made, new=new)
        if mine is not None:
            try:
                yield folder
            finally:
                _release(folder, mine, made)
            return
    raise OutputExistsError("another process took that folder meanwhile; wait for it, or choose another --out")


def _locked(folder: Path, made: list[Path], *, new: bool) -> Path | None:
    """The lock of this process on a folder, None where that belongs to another; `made` gets the folders it takes."""
    store = folder / STORE
    try:
        made += [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=not new)
        store.mkdir(exist_ok=True)
        mine = lock.take(store)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.parent.is_dir():  # somebody else was faster
            return None
        _remove_empty((store, *made))
        raise OutputExistsError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    for place in (store, folder) if mine is not None else ():
        for left in place.glob(f"{LEFTOVER}*.part"):  # of a process that was killed
            remove(left)
    return mine


def _release(folder: Path, mine: Path, made: Sequence[Path]) -> None:
    store = folder / STORE
    beside, inside = ({path.name for path in place.glob("*")} for place in (folder, store))
    if beside == {STORE} and inside <= {ASKED, mine.name}:  # nothing was kept
        (store / ASKED).unlink(missing_ok=True)
    mine.unlink(missing_ok=True)
    _remove_empty((store, *made))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


def newest_model(below: Path) -> Path:
    """The model of the newest finished run below a folder; CheckpointError where there is none."""
    runs = [record.parent for record in below.rglob(RECORD) if not _hidden(record.relative_to(below))]
    found = [run / MODEL_FILE for run in runs if (run / MODEL_FILE).is_file()]
    if not found:
        raise CheckpointError(f"no run of kcrprune lies below {below.resolve()}; name a model, or run compress first")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
