"""A run from the checkpoint to its folder: begun, gone on with, or shown again."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from kcrprune import processes
from kcrprune.artifact.artifact import MODEL_FILE
from kcrprune.atomic import require_room
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Listener
from kcrprune.measure.macs import count_parameters
from kcrprune.measure.report import Comparison, Timing
from kcrprune.run import folder as folders
from kcrprune.run.context import Context
from kcrprune.run.folder import STORE, Asked
from kcrprune.run.metrics import Metrics
from kcrprune.run.stage import Results, Stage, execute
from kcrprune.run.stages import REFUSALS, STAGES
from kcrprune.run.store import Store
from kcrprune.training.precision import arithmetic


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    comparison: Comparison
    speed: Timing | None = None  # of the cut network beside the dense one, where that was measured


def compress(
    checkpoint: Path,
    config: RunConfig,
    out: Path | None,
    listener: Listener,
    *,
    fresh: bool = False,
    origins: Mapping[str, str] | None = None,
) -> RunResult:
    """Compresses a checkpoint into a run folder.

    What can be refused is refused before there is a folder. A run that was stopped goes on where it was asked the same,
    and one that is finished is shown again; neither with `fresh`,
    nor are stages taken over that other runs beside it have finished. `origins` says where settings come from.
    """
    with arithmetic(config):
        return _compressed(Context(checkpoint, config, listener, origins or {}), out, fresh=fresh)


def _compressed(context: Context, out: Path | None, *, fresh: bool) -> RunResult:
    checkpoint, config = context.checkpoint, context.config
    if out is not None and processes.rank() == 0:
        folders.require_usable(out, fresh=fresh)
    given = load(context)
    asked = Asked.of(given["open"].digest, given["images"].fingerprint, config)
    _require_alike(asked)
    name = f"{_title(checkpoint, given['open'].opened)}-{config.target_name}"
    with processes.entered_by_first(folders.taken(folders.candidates(out, name, asked, fresh=fresh))) as folder:
        if processes.of_first(lambda: folders.finished(folder)):
            context.tell(f"{folder} is finished and was asked the same; it is shown again (--fresh makes a new one)")
            return RunResult(folder, _shown(folder), _speed(folder))
        others = {} if fresh or processes.rank() > 0 else folders.relatives(folder, asked)
        comparison = finish(context, Store(folder / STORE, others), folder, asked, given)
        return RunResult(folder, comparison, _speed(folder))


def _title(checkpoint: Path, opened: Opened) -> str:
    """What a run's folder is called after."""
    if opened.fetched:
        return opened.fetched.title
    named = checkpoint.resolve()
    return os.fsencode(named.name if named.is_dir() else named.stem).decode("utf-8", "replace")


def load(context: Context, stages: Sequence[Stage] = REFUSALS) -> Results:
    """The network and the images of a run, or the refusal of what cannot work."""
    with context.part("load"):
        return execute(stages, context, wanted=("open", "place", "images"))


def _shown(folder: Path) -> Comparison:
    """Before and after of a finished run, which the first of several processes reads."""
    return Comparison.model_validate(processes.of_first(lambda: folders.comparison(folder).model_dump(mode="json")))


def _speed(folder: Path) -> Timing | None:
    """What the first process measured, and it alone shows."""
    return folders.speed(folder) if processes.rank() == 0 else None


def _require_alike(asked: Asked) -> None:
    """ConfigError where one of several processes was asked something else than the first, or sees other files."""
    first, *others = [Asked.model_validate(each) for each in processes.of_all(asked.model_dump(mode="json"))]
    for number, other in enumerate(others, start=1):
        if strange := first.differences(other):
            raise ConfigError(
                f"process {number} differs from process 0 in {', '.join(strange)}; give all the same command and files"
            )


def finish(
    context: Context, store: Store, folder: Path, asked: Asked, given: Results, stages: Sequence[Stage] = STAGES
) -> Comparison:
    """Executes what is left of a run in its folder."""
    context.folder = folder
    if processes.rank() == 0:
        _begin(context, folder, asked, given)
    metrics = Metrics(folder, context.listener, board=context.config.tensorboard)
    with metrics if processes.rank() == 0 else nullcontext(context.listener) as context.listener:
        comparison = execute(stages, context, store, given, wanted=("save",))["save"]
    store.drop_snapshots()
    return comparison


def _begin(context: Context, folder: Path, asked: Asked, given: Results) -> None:
    """Looks whether there is room, tells what has changed, and writes down what is asked."""
    if not (folder / MODEL_FILE).is_file():  # it costs too much to find that out in the end
        require_room(folder / MODEL_FILE, 4 * count_parameters(given["open"].dense))
    before = Asked.read(folder)
    if before is not None and (changed := before.differences(asked)):
        context.tell(f"changed since the run was stopped: {', '.join(changed)}; what depends on it is made again")
    asked.write(folder)
