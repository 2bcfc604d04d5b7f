"""The network that a configuration speaks of, and what may be cut of it."""

from pathlib import Path

from torch import nn

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.families import sites
from kcrprune.method.budget import Purse
from kcrprune.plan import Axis
from kcrprune.surgery.gated import is_open, matches


def open_for_run(checkpoint: Path, config: RunConfig) -> Opened:
    """The dense network that a configuration speaks of."""
    overrides = ("arch", "num_heads", "num_classes", "img_size", "mean", "std", "interpolation", "crop_pct")
    return open_model(checkpoint, **{name: getattr(config, name) for name in overrides})


def purse_of(model: nn.Module, macs: int, config: RunConfig) -> Purse:
    """What a configuration may spend on a dense model; ConfigError names a pattern that no block matches."""
    found = sites(model)
    for pattern in (*config.include, *config.exclude):
        if not any(matches(site, [pattern]) for site in found):
            raise ConfigError(f"no block is named {pattern!r}; the blocks here are {found[0].name} to {found[-1].name}")
    open_axes: dict[str, tuple[Axis, ...]] = {
        site.name: tuple(axis for axis in config.axes if axis in site.axes)
        for site in found
        if is_open(site, config.include, config.exclude)
    }
    return Purse(macs, found, open_axes, config.round_to, config.min_width)
