"""Single branches of a network as it calls them, and copies of them at other widths: what a clock is held to."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from kcrprune.families import Group, Key, Stream, streams_of
from kcrprune.families.contract import class_name
from kcrprune.method.budget import kept_of
from kcrprune.plan import PER_HEAD, ChannelPlan
from kcrprune.surgery.narrow import cut_

HERE: Final = "branch"  # what a branch is called that stands alone


@dataclass(frozen=True)
class Branch:
    """A branch module, its groups, and what it was called with; nested: it keeps the first channels of its stream."""

    module: nn.Module
    groups: tuple[Group, ...]
    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    nested: bool = False

    @property
    def kind(self) -> str:
        """Alike for branches that take as long: the class, the shapes of what it is called with, the widths."""
        given = ", ".join(_told([*self.args, *self.keywords.values()]))
        widths = ", ".join(f"{g.axis} {g.heads} x {g.width}" for g in self.groups if g.axis != "heads")
        return f"{class_name(type(self.module))} ({given}), {widths}"

    def at(self, widths: Mapping[Key, int]) -> Callable[[], Any]:
        """A call of a copy that keeps the first channels of each group and the first heads."""
        holder = nn.ModuleDict({HERE: copy.deepcopy(self.module)})
        heads = {group.axis: widths[group.key] for group in self.groups if group.axis == "heads"}
        kept = []
        for group in self.groups:
            if group.axis != "heads":
                stay = range(heads["heads"] if group.axis in PER_HEAD else group.heads)
                kept.append(kept_of(_moved(group), stay, [range(widths[group.key] // group.span)] * len(stay)))
        groups = tuple(map(_moved, self.groups))
        streams = [Stream(g.width, (*g.writers, *g.readers)) for g in groups if g.wide and self.nested]
        plan = ChannelPlan(
            architecture=None, groups=tuple(kept), stream=tuple(tuple(range(stream.width)) for stream in streams)
        )
        cut = cut_(holder, plan, groups, streams).get_submodule(HERE)
        return lambda: cut(*self.args, **self.keywords)


def _moved(group: Group) -> Group:
    """A group whose branch stands alone."""
    length = len(group.site)
    return replace(
        group,
        site=HERE,
        **{
            name: tuple(replace(slot, owner=HERE + slot.owner[length:]) for slot in getattr(group, name))
            for name in ("writers", "readers", "per_head")
        },
    )


def _told(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, Tensor):
            yield "x".join(map(str, value.shape))
        elif isinstance(value, list | tuple):
            yield f"[{', '.join(_told(value))}]"
        elif isinstance(value, bool | int | str):
            yield str(value)


@torch.no_grad()
def branches_of(
    model: nn.Module, sites: Mapping[str, tuple[Group, ...]], images: Any
) -> tuple[dict[str, str], dict[str, Branch]]:
    """The kind of each branch that one forward pass calls, by site, and the first branch of each kind.

    `sites` has the groups of each branch that is looked at.
    """
    kinds: dict[str, str] = {}
    found: dict[str, Branch] = {}
    streams = streams_of(model)

    def watch(site: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, keywords: Any) -> None:
            nested = any(stream.holds(group) for stream in streams for group in sites[site])
            branch = Branch(module, sites[site], args, keywords, nested)
            kinds[site] = branch.kind
            found.setdefault(branch.kind, branch)

        return see

    hooks = [model.get_submodule(site).register_forward_pre_hook(watch(site), with_kwargs=True) for site in sites]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return kinds, found
