"""kcrprune: smaller vision transformers by reduction of kernel complexity.

    import kcrprune

    result = kcrprune.compress("swin_t.pth", target_flops=0.7)
    model = kcrprune.load(result.folder)  # a plain torch.nn.Module

torch and timm load when a verb is called, not before, and nothing else before it is asked for: the command line has
to be there at once, to be interrupted well.
"""

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcrprune.errors import KcrPruneError
from kcrprune.events import Listener, ignore
from kcrprune.version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

    from kcrprune.config import RunConfig
    from kcrprune.graphs import ExportResult
    from kcrprune.measure.report import ModelReport
    from kcrprune.pipeline import RunResult
    from kcrprune.plan import ChannelPlan

__all__ = ["ChannelPlan", "KcrPruneError", "RunConfig", "compress", "export_onnx", "load", "report", "save"]

AnyPath = str | PathLike[str]


def __getattr__(name: str) -> Any:
    """The classes of the public surface."""
    homes = {"ChannelPlan": "plan", "RunConfig": "config"}
    if name not in homes:
        raise AttributeError(f"module 'kcrprune' has no attribute {name!r}")
    return getattr(import_module(f"kcrprune.{homes[name]}"), name)


def compress(
    checkpoint: AnyPath,
    *,
    out: AnyPath | None = None,
    recipe: str | None = None,
    config: AnyPath | None = None,
    fresh: bool = False,
    listener: Listener = ignore,
    **settings: Any,
) -> "RunResult":
    """Cuts the network in a checkpoint to a share of its MACs; returns the run's folder and its before and after.

    `settings` are the fields of `RunConfig`; they win over the TOML file `config`, which wins over the recipe.
    The same call again goes on with a run that was stopped, and returns one that is finished; `fresh` begins another.
    """
    from kcrprune import pipeline
    from kcrprune.config import load_config, origins

    asked = recipe, None if config is None else Path(config), settings
    folder, known = None if out is None else Path(out), origins(*asked)
    return pipeline.compress(Path(checkpoint), load_config(*asked), folder, listener, fresh=fresh, origins=known)


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
    *models: AnyPath, latency: bool = False, listener: Listener = ignore, **network: Any
) -> "tuple[ModelReport, ...]":
    """The figures of each model: architecture, MACs, parameters, kept widths; with `latency` also milliseconds.

    `network` as for `load`; what kcrprune wrote knows its own.
    """
    from kcrprune import pipeline
    from kcrprune.config import network_config

    paths, config = [Path(model) for model in models], network_config(network)
    return pipeline.report(paths, latency=latency, listener=listener, config=config)
