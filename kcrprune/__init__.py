"""kcrprune: smaller vision transformers by reduction of kernel complexity.

    import kcrprune

    result = kcrprune.compress("swin_t.pth", target_flops=0.7)
    model = kcrprune.load(result.folder)  # a plain torch.nn.Module

torch and timm load when a verb is called, not before, and nothing else before it is asked for: the command line has
to be there at once, to be interrupted well.
"""

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

__all__ = ["ChannelPlan", "KcrPruneError", "RunConfig", "compress", "export_onnx", "load", "report"]

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
    from kcrprune.config import load_config

    run = load_config(recipe, None if config is None else Path(config), settings)
    return pipeline.compress(Path(checkpoint), run, None if out is None else Path(out), listener, fresh=fresh)


def load(path: AnyPath) -> "nn.Module":
    """The network in a run's folder or a checkpoint: a plain module on the CPU, in eval mode."""
    from kcrprune.artifact.artifact import open_model

    return open_model(Path(path)).model


def export_onnx(model: AnyPath, onnx: AnyPath | None = None, *, listener: Listener = ignore) -> "ExportResult":
    """Writes the network in a run's folder or a checkpoint as ONNX and compares it with PyTorch; raises if they differ.

    Without `onnx` the file lies beside the model.
    """
    from kcrprune import pipeline

    return pipeline.export(Path(model), None if onnx is None else Path(onnx), listener)


def report(*models: AnyPath, latency: bool = False, listener: Listener = ignore) -> "tuple[ModelReport, ...]":
    """The figures of each model: architecture, MACs, parameters, kept widths; with `latency` also milliseconds."""
    from kcrprune import pipeline

    return pipeline.report([Path(model) for model in models], latency=latency, listener=listener)
