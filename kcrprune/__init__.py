"""kcrprune: smaller vision transformers by reduction of kernel complexity.

    import kcrprune

    result = kcrprune.compress("swin_t.pth", target_flops=0.7)
    model = kcrprune.load(result.folder)  # a plain torch.nn.Module

torch and timm load when a verb is called, not before, and nothing else before it is asked for: the command line has
to be there at once, to be interrupted well.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kcrprune.errors import ConfigError, KcrPruneError
from kcrprune.events import Listener, ignore
from kcrprune.version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

    from kcrprune.config import RunConfig
    from kcrprune.families.contract import Rules
    from kcrprune.families.foreign import hidden_units as hidden_units
    from kcrprune.families.foreign import whole_heads as whole_heads
    from kcrprune.graphs import ExportResult
    from kcrprune.measure.bench import Bench
    from kcrprune.measure.report import ModelReport
    from kcrprune.pipeline import GivenResult, Listing, RunResult
    from kcrprune.plan import ChannelPlan

__all__ = [
    "Bench",
    "ChannelPlan",
    "KcrPruneError",
    "RunConfig",
    "compress",
    "export_onnx",
    "groups",
    "hidden_units",
    "load",
    "report",
    "restore",
    "save",
    "whole_heads",
]

AnyPath = str | PathLike[str]


def __getattr__(name: str) -> Any:
    """The classes of the public surface, and the rules of one line."""
    homes = {"ChannelPlan": "plan", "Bench": "measure.bench", "RunConfig": "config"} | dict.fromkeys(
        ("hidden_units", "whole_heads"), "families.foreign"
    )
    if name not in homes:
        raise AttributeError(f"module 'kcrprune' has no attribute {name!r}")
    return getattr(import_module(f"kcrprune.{homes[name]}"), name)


@overload
def compress(checkpoint: AnyPath, **options: Any) -> "RunResult": ...


@overload
def compress(checkpoint: "nn.Module", **options: Any) -> "GivenResult": ...


def compress(
    checkpoint: "AnyPath | nn.Module",
    *,
    images: Iterable[Any] | None = None,
    part: str = "",
    inputs: Any = None,
    outputs: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    rules: "Rules | None" = None,
    out: AnyPath | None = None,
    recipe: str | None = None,
    config: AnyPath | None = None,
    fresh: bool = False,
    listener: Listener = ignore,
    **settings: Any,
) -> "RunResult | GivenResult":
    """Cuts a network to a share of its MACs: one in a checkpoint, or any module in memory.

    `settings` are the fields of `RunConfig`; they win over the TOML file `config`, which wins over the recipe.
    The same call again goes on with a run that was stopped, and returns one that is finished; `fresh` begins another.
    Of a checkpoint it returns the run's folder and its before and after.

    Of a module it returns a new one, `result.model`, as well; the given one is untouched, and the run leaves no folder
    unless `out` names one. `images` is a loader of batches; `part` the submodule that is cut and whose MACs count;
    `inputs` says how a batch becomes the module's arguments, `outputs` what is compared (see `Use` in
    kcrprune/families/given.py); `loss(returned, batch)` is added where the network is trained; `rules` are those of
    your own classes. Raises ConfigError, UnsupportedModelError or DataError for what does not fit together.
    """
    from kcrprune import pipeline
    from kcrprune.config import load_config, origins

    asked = recipe, None if config is None else Path(config), settings
    run, known, place = load_config(*asked), origins(*asked), None if out is None else Path(out)
    if isinstance(checkpoint, str | PathLike):
        if any(given is not None for given in (images, inputs, outputs, loss, rules)) or part:
            raise ConfigError(
                "images, part, inputs, outputs, loss and rules are for a module in memory, not for a file"
            )
        return pipeline.compress(Path(checkpoint), run, place, listener, fresh=fresh, origins=known)
    from kcrprune.families.given import Use
    from kcrprune.pipeline.given import require_for_memory, require_module

    require_module(checkpoint, images)
    require_for_memory(settings)
    use = Use(part, inputs, outputs, loss)
    return pipeline.compress_given(checkpoint, images or (), use, run, place, listener, rules=rules or {}, fresh=fresh)


def groups(model: "nn.Module", *, part: str = "", rules: "Rules | None" = None) -> "Listing":
    """What rules find to cut in a module, and why not more; print it."""
    from kcrprune import pipeline

    return pipeline.listing(model, part, rules or {})


def restore(dense: "nn.Module", path: AnyPath, *, rules: "Rules | None" = None) -> "nn.Module":
    """A copy of a dense module, cut as the network that a run on it, or `save`, has stored at `path`; with its weights.

    The way back for classes that only you can build. CheckpointError for a file that is damaged, PlanMismatchError for
    one of another network.
    """
    from kcrprune.artifact.given import restored

    return restored(dense, Path(path), rules or {})


def load(path: AnyPath, **network: Any) -> "nn.Module":
    """The network in a run's folder or a checkpoint: a plain module on the CPU, in eval mode.

    `network` are the settings that say how a checkpoint is read, such as `num_heads`. What it needs to be stored again
    is noted on the module; see `save`.
    """
    from kcrprune.artifact.artifact import open_model
    from kcrprune.artifact.origin import remembering
    from kcrprune.config import network_config, network_of

    return remembering(open_model(Path(path), **network_of(network_config(network))))


def save(model: "nn.Module", folder: AnyPath, *, class_names: Sequence[str] | None = None) -> Path:
    """Stores a network that `load` gave and that was trained on since, in a folder that every verb takes.

    One that a run in memory or `restore` gave is stored for `restore`.
    Its classifier may be another one by now; `class_names` are its classes' then. Raises for any other change of
    structure, for weights that are no finite numbers, and where `folder` holds a model.
    """
    from kcrprune.artifact.origin import save_trained

    return save_trained(model, Path(folder), class_names)


def export_onnx(
    model: AnyPath, onnx: AnyPath | None = None, *, opset: int = 20, listener: Listener = ignore, **network: Any
) -> "ExportResult":
    """Writes the network in a run's folder or a checkpoint as ONNX and compares it with PyTorch; raises if they differ.

    Without `onnx` the file lies beside the model; `network` as for `load`.
    """
    from kcrprune import pipeline
    from kcrprune.config import network_config

    path, config = None if onnx is None else Path(onnx), network_config(network)
    return pipeline.export(Path(model), path, listener, config=config, opset=opset)


def report(
    *models: AnyPath, bench: "Bench | None" = None, listener: Listener = ignore, **network: Any
) -> "tuple[ModelReport, ...]":
    """The figures of each model: architecture, MACs, parameters, kept widths; with a `Bench` also their times.

    `network` as for `load`; what kcrprune wrote knows its own.
    """
    from kcrprune import pipeline
    from kcrprune.config import network_config

    paths, config = [Path(model) for model in models], network_config(network)
    return pipeline.report(paths, bench=bench, listener=listener, config=config)
