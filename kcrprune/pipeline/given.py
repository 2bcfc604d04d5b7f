"""A run on a network in memory: the same stages, in a temporary folder unless one is named."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from torch import nn

from kcrprune.artifact.given import restored
from kcrprune.config import NETWORK, RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Listener
from kcrprune.families.contract import Rules
from kcrprune.families.given import Use
from kcrprune.measure.report import Comparison
from kcrprune.pipeline.compress import finish, load
from kcrprune.run import folder as folders
from kcrprune.run.context import Context
from kcrprune.run.folder import RECORD, STORE, Asked
from kcrprune.run.given import Source
from kcrprune.run.stages import REFUSALS, in_memory
from kcrprune.run.store import Store
from kcrprune.training.feeds import read_feeds
from kcrprune.training.precision import arithmetic, require_one_process

OF_FILES: Final = {  # settings that say how files are read, or what their labels are for
    *NETWORK,
    *("data", "dataset", "train_split", "val_split", "class_map", "labels", "generated_images", "hflip", "workers"),
    *("batch_size", "teacher", "task", "smoothing", "distill_temperature"),
}


@dataclass(frozen=True)
class GivenResult:
    """A finished run on a network in memory.

    `model` is a new module of the class of the given one, in eval mode. `distances` are the relative squared distances
    of its outputs to those of the dense network, by name, on images that nothing was fitted on. `folder` is None where
    none was asked for.
    """

    model: nn.Module
    comparison: Comparison
    distances: Mapping[str, float]
    folder: Path | None


def compress_given(
    model: nn.Module,
    loader: Iterable[Any],
    use: Use,
    config: RunConfig,
    out: Path | None,
    listener: Listener,
    *,
    rules: Rules,
    fresh: bool = False,
) -> GivenResult:
    """Cuts a copy of a network in memory; what can be refused is refused before there is a folder."""
    require_one_process()
    if out is not None:
        folders.require_usable(out, fresh=fresh)
    source = Source(model, use, read_feeds(loader, use, config), rules, _names_of(use))
    context, stages = Context(Path(type(model).__name__), config, listener), in_memory(source)
    with arithmetic(config):
        given = load(context, stages[: len(REFUSALS)])
    asked = Asked.of(given["open"].digest, given["images"].fingerprint, config)
    with arithmetic(config), _folder(out, asked, fresh=fresh) as folder:
        if folders.finished(folder):
            context.tell(f"{folder} is finished and was asked the same; it is shown again (fresh makes a new one)")
            comparison = folders.comparison(folder)
        else:
            comparison = finish(context, Store(folder / STORE), folder, asked, given, stages)
        record = json.loads((folder / RECORD).read_text("utf-8"))
        cut = restored(model, folder, rules)
        return GivenResult(cut, comparison, record["decisions"]["distances"], None if out is None else folder)


@contextmanager
def _folder(out: Path | None, asked: Asked, *, fresh: bool) -> Iterator[Path]:
    if out is not None:
        with folders.taken(folders.candidates(out, "", asked, fresh=fresh)) as folder:
            yield folder
        return
    with (
        tempfile.TemporaryDirectory(prefix="kcrprune-") as above,
        folders.taken([(Path(above, "run"), True)]) as folder,
    ):
        yield folder


def _names_of(use: Use) -> str:
    """The functions and names that a run depends on; a function without a name of its own is none of another run's."""
    return " ".join(map(_name_of, (use.inputs, use.outputs, use.loss)))


def _name_of(value: Any) -> str:
    if not callable(value):
        return repr(value)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
    return f"{module}:{name}" if module and "<" not in name else uuid4().hex


def require_for_memory(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting that says how files are read."""
    for name in settings:
        if name in OF_FILES:
            raise ConfigError(f"{name} is for networks and images in files; these are in memory, so leave it out")


def require_module(model: Any, images: Any) -> None:
    """ConfigError for what is neither a path nor a module, and for a module without a loader."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a network is a path or a torch module, and this is a {type(model).__name__}")
    if images is None or not isinstance(images, Iterable):
        raise ConfigError("a network in memory needs images=: a loader of batches, such as a DataLoader or a list")
