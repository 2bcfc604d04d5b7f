"""A run from the checkpoint to its folder: begun, gone on with, or shown again."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kcrprune.artifact.artifact import MODEL_FILE
from kcrprune.atomic import require_room
from kcrprune.config import RunConfig
from kcrprune.events import Listener
from kcrprune.measure.macs import count_parameters
from kcrprune.measure.report import Comparison
from kcrprune.run import folder as folders
from kcrprune.run.context import Context
from kcrprune.run.folder import STORE, Asked
from kcrprune.run.metrics import Metrics
from kcrprune.run.stage import Results, Stage, execute
from kcrprune.run.stages import REFUSALS, STAGES
from kcrprune.run.store import Store


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    comparison: Comparison


def compress(
    checkpoint: Path, config: RunConfig, out: Path | None, listener: Listener, *, fresh: bool = False
) -> RunResult:
    """Compresses a checkpoint into a run folder.

    What can be refused is refused before there is a folder. A run that was stopped goes on where it was asked the same,
    and one that is finished is shown again; neither with `fresh`.
    """
    if out is not None:
        folders.require_usable(out, fresh=fresh)
    context = Context(checkpoint, config, listener)
    given = load(context)
    asked = Asked.of(given["open"].digest, given["images"].fingerprint, config)
    named = checkpoint.resolve()
    stem = os.fsencode(named.name if named.is_dir() else named.stem).decode("utf-8", "replace")
    name = f"{stem}-{config.target_flops:g}"
    with folders.taken(folders.candidates(out, name, asked, fresh=fresh)) as folder:
        if folders.finished(folder):
            context.tell(f"{folder} is finished and was asked the same; it is shown again (--fresh makes a new one)")
            return RunResult(folder, folders.comparison(folder))
        return RunResult(folder, finish(context, folder, asked, given))


def load(context: Context, stages: Sequence[Stage] = REFUSALS) -> Results:
    """The network and the images of a run, or the refusal of what cannot work."""
    with context.part("load"):
        return execute(stages, context, wanted=("open", "images"))


def finish(
    context: Context, folder: Path, asked: Asked, given: Results, stages: Sequence[Stage] = STAGES
) -> Comparison:
    """Executes what is left of a run in its folder."""
    if not (folder / MODEL_FILE).is_file():  # it costs too much to find that out in the end
        require_room(folder / MODEL_FILE, 4 * count_parameters(given["open"].dense))
    before = Asked.read(folder)
    if before is not None and (changed := before.differences(asked)):
        context.tell(f"changed since the run was stopped: {', '.join(changed)}; what depends on it is made again")
    asked.write(folder)
    context.folder, store = folder, Store(folder / STORE)
    with Metrics(folder, context.listener, board=context.config.tensorboard) as context.listener:
        comparison = execute(stages, context, store, given, wanted=("save",))["save"]
    store.drop_tensors()
    return comparison
