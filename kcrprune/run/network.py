"""The network that a configuration speaks of, and what may be cut of it."""

from pathlib import Path

from torch import nn

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig, network_of
from kcrprune.errors import ConfigError
from kcrprune.families import contract_of
from kcrprune.method.allowed import Allowed
from kcrprune.method.cost import MacCost
from kcrprune.surgery.gated import is_open, matches


def open_for_run(checkpoint: Path, config: RunConfig) -> Opened:
    """The dense network that a configuration speaks of."""
    return open_model(checkpoint, **network_of(config))


def allowed_of(model: nn.Module, macs: int, input_size: tuple[int, int, int], config: RunConfig) -> Allowed[MacCost]:
    """What a configuration may spend on a dense model; ConfigError names a pattern that no block matches."""
    cost = MacCost.of(model, contract_of(model, input_size), macs)
    return opened_groups(cost, config)


def opened_groups(cost: MacCost, config: RunConfig) -> Allowed[MacCost]:
    """The groups that a configuration opens of a network with this cost."""
    groups = cost.contract.groups
    for pattern in (*config.include, *config.exclude):
        if not any(matches(group.block, [pattern]) for group in groups):
            raise ConfigError(
                f"no block is named {pattern!r}; the blocks here are {groups[0].block} to {groups[-1].block}"
            )
    open_ = frozenset(
        group.key
        for group in groups
        if group.axis in config.axes and not group.whole and is_open(group, config.include, config.exclude)
    )
    return Allowed(cost, groups, open_, config.round_to, config.min_width, nested=cost.contract.nested)
