"""What a network's outputs are: decided once, when a file is opened, and with a sentence that says how it is known."""

from typing import Final

from timm.models import get_arch_pretrained_cfgs
from torch import nn

from kcrprune.checkpoints.clues import ASKED
from kcrprune.checkpoints.layouts import Layout
from kcrprune.errors import ConfigError
from kcrprune.families import classifiers
from kcrprune.plan import Architecture, Outputs

SAY: Final = "--outputs classes says that they are classes"


def outputs_of_file(
    model: nn.Module,
    asked: Outputs | None,
    architecture: Architecture,
    layout: Layout,
    *,
    named: bool,
    new_head: bool,
) -> tuple[Outputs, tuple[str, ...]]:
    """The outputs of a network that was opened; `named` says that the file names its classes.

    ConfigError where classes are asked for and nothing at its end could be their logits.
    """
    last = classifiers(model)
    if not last:
        if asked == "classes":
            raise ConfigError("--outputs classes contradicts the file, whose network has no classifier; leave it out")
        return "features", ()
    if asked is not None:
        return asked, (f"outputs are {asked}: {ASKED}",)
    width = last[0].out_features
    if new_head or named:
        return "classes", ()
    if layout.projects:
        return "features", (f"outputs are an embedding of {width} channels: the last layer of {layout.name}; {SAY}",)
    if width in projections(architecture.name):
        return "features", (
            f"outputs are an embedding of {width} channels, as of weights that timm has for {architecture.name}; {SAY}",
        )
    return "classes", ()


def projections(name: str) -> set[int]:
    """The widths of the embeddings of images and texts that timm has weights of a registered network for."""
    return {
        config.num_classes
        for tag, config in get_arch_pretrained_cfgs(name).items()
        if ("clip" in tag or "pe_core" in tag) and "_ft_" not in tag and config.num_classes not in (0, 1000)
    }
