"""The order that a plan sets for the channels of the residual streams: the dense network, and its features, in it."""

import copy
from collections.abc import Sequence

from torch import nn

from kcrprune.families import Group, classifiers, streams_of
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.narrow import cut_, index_map, keep_all


def arranged(dense: nn.Module, groups: Sequence[Group], plan: ChannelPlan) -> tuple[nn.Module, ChannelPlan]:
    """A dense network whose streams have a plan's order, and the plan as it reads for that: what it cuts lies there.

    The same network and plan where none is set, else a copy.
    """
    if plan.stream is None:
        return dense, plan
    streams = streams_of(dense, groups)
    whole = tuple(keep_all(group) for group in groups if group.axis != "heads")
    first = {group.key for group in groups if any(stream.holds(group) for stream in streams)}
    kept = [
        entry.model_copy(update={"channels": (tuple(range(entry.kept_width)),)}) if entry.key in first else entry
        for entry in plan.groups
    ]
    only_order = ChannelPlan(architecture=plan.architecture, groups=whole, stream=plan.stream)
    return (
        cut_(copy.deepcopy(dense), only_order, groups, streams),
        ChannelPlan(architecture=plan.architecture, groups=tuple(kept)),
    )


def features_of(dense: nn.Module, groups: Sequence[Group], plan: ChannelPlan) -> list[int]:
    """Which of the dense network's features stands at each place in the cut one's: what its classifiers read."""
    index = index_map(dense, groups, plan)
    names = {module: name for name, module in dense.named_modules()}
    found: list[int] = []
    for classifier in classifiers(dense):
        own = index.get(f"{names[classifier]}.weight", {}).get(1, range(classifier.in_features))
        found += [len(found) + place for place in own]
    return found
