"""The contract of whatever may be cut: groups of coupled channels, and where they lie in the tensors of a network.

A group lives inside one branch module (an MLP, an attention); a rule, keyed by the exact class of that module, says
where its channels lie in the tensors that write them and in those that read them. Gates, cut, cost, balance and refit
are derived from that. No rule speaks of the residual stream, which keeps its width; of some networks it is known where
its channels lie (`streams.py`), so that they may stand in another order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from kcrprune.plan import Axis, block_of

Key = tuple[str, Axis]  # site and axis: what a width is decided for
Tie = Literal["", "neighbours", "halves"]
Basis = Literal["free", "orthogonal", "fixed"]


@dataclass(frozen=True)
class Slot:
    """Where the channels of a group lie in one dimension of one owner: channel c of head h at start + h * stride + c.

    The owner is a module with a weight (a linear, a convolution, a norm; its bias, and what a batch norm has seen, go
    with dimension 0), or a bare tensor.
    """

    owner: str  # dotted name
    dim: int
    start: int = 0
    stride: int = 0

    def below(self, site: str) -> "Slot":
        """The same slot with its owner's name inside a site."""
        return replace(self, owner=f"{site}.{self.owner}")

    def places(self, heads: int, width: int) -> list[int]:
        """Where all channels of all heads lie, head by head."""
        return [self.start + head * self.stride + channel for head in range(heads) for channel in range(width)]

    def among(self, heads: int, width: int) -> slice | list[int]:
        """The same as an index: a slice where they lie side by side, which no device waits for."""
        side_by_side = heads == 1 or self.stride == width
        return slice(self.start, self.start + heads * width) if side_by_side else self.places(heads, width)


@dataclass(frozen=True)
class Group:
    """Channels that stay or go together: `heads` x `width`, one head for an MLP.

    The axis `heads` is a group of its own, whose channels are the heads of the other groups at its site.
    """

    site: str  # the branch module
    axis: Axis
    heads: int
    width: int
    writers: tuple[Slot, ...] = ()  # of a group without readers the first half writes q, the second k
    readers: tuple[Slot, ...] = ()  # none: the product of the two halves of the writers is the reader
    per_head: tuple[Slot, ...] = ()  # one entry a head: bias tables, temperatures
    tie: Tie = ""  # channels that go in pairs: 2i with 2i + 1, or i with i + width / 2
    norm: str | None = None  # a norm over the channels between writers and readers
    basis: Basis = "free"  # the changes of basis inside a head that leave the network unchanged
    stream: str | None = None  # the module whose input is the stream that the branch is added to
    behind: str | None = None  # the next norm on the stream in the block; None: the block ends with this branch
    scale: str | None = None  # LayerScale between the branch and that stream
    affine: str | None = None  # a batch norm right behind the reader
    products: int = 1  # of attention's two, those that have the channels on a side; see `channels`
    told: str = ""  # an attribute of the branch module that holds the width
    wide: bool = False  # the channels are the stream's own: readers gather, writers scatter
    alone: bool = False  # the branch lies in a list of modules, which nobody calls
    whole: bool = False  # the channels stay, and whole heads alone may go: heads share what is theirs
    constant: str | None = None  # the reader whose bias is all that is left of a branch that goes; None: it stays

    @property
    def key(self) -> Key:
        """What identifies the group in a network."""
        return self.site, self.axis

    @property
    def block(self) -> str:
        """What users know as the block; the branch itself where nothing that is called lies around it."""
        return self.site if self.alone else block_of(self.site, self.axis)

    @property
    def span(self) -> int:
        """Channels that one gate holds."""
        return 2 if self.tie else 1

    @property
    def units(self) -> int:
        """Gates of a head."""
        return self.width // self.span

    def channels(self, units: Iterable[int]) -> tuple[int, ...]:
        """The channels of some units of a head, ascending."""
        if self.tie == "neighbours":
            return tuple(sorted(channel for unit in units for channel in (2 * unit, 2 * unit + 1)))
        if self.tie == "halves":
            return tuple(sorted(channel for unit in units for channel in (unit, unit + self.units)))
        return tuple(sorted(units))

    def spread(self, units: Tensor) -> Tensor:
        """Values (..., heads * units) of the units as values (..., heads * width) of their channels."""
        if not self.tie:
            return units
        by_head = units.unflatten(-1, (self.heads, self.units))
        if self.tie == "neighbours":
            return by_head.repeat_interleave(2, dim=-1).flatten(-2)
        return by_head.repeat(*(1,) * (by_head.ndim - 1), 2).flatten(-2)


@dataclass(frozen=True)
class Stream:
    """A residual stream: in every slot lie its channels, side by side and in one order, which may be another."""

    width: int
    slots: tuple[Slot, ...]

    def holds(self, group: Group) -> bool:
        """Whether the channels of a group are this stream's."""
        return group.wide and group.readers[0] in self.slots


@dataclass(frozen=True)
class Branch:
    """How a pre-norm block adds a branch to its stream: behind which norm, through which LayerScale, and what follows.

    `norm` is '' where the branch takes in the stream itself; `behind` is the norm of the next branch, '' where the
    block ends with this one.
    """

    norm: str
    scale: str = ""
    behind: str = ""


Rule = Callable[[str, nn.Module], tuple[Group, ...]]  # (name, module) to its groups, in the order of AXES
Rules = Mapping[Any, Rule]  # by exact class, or by its name where its library is not loaded for it
Blocks = Mapping[Any, Mapping[str, Branch]]

T = TypeVar("T")


def class_name(cls: type) -> str:
    """How a class is named without loading it: `module:Class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def of_class(table: Mapping[Any, T], cls: type) -> T | None:
    """The entry of exactly this class, by itself or by its name."""
    return table.get(cls) or table.get(class_name(cls))


def newer(module: str, name: str) -> type:
    """A class that only a newer timm has; where the installed one lacks it, a class that no module is of."""
    try:
        return getattr(import_module(f"timm.models.{module}"), name)
    except (ImportError, AttributeError):
        return type(name, (), {})


def owner_of(model: nn.Module, name: str) -> nn.Module | Tensor:
    """The module, parameter or buffer of that name."""
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def find_groups(model: nn.Module, rules: Rules, blocks: Blocks) -> tuple[Group, ...]:
    """Every group of a network, by the exact class of each of its modules; `blocks` knows what lies around branches."""
    found: list[Group] = []
    for name, module in model.named_modules():
        if rule := of_class(rules, type(module)):
            here = [_placed(model, group, blocks) for group in rule(name, module)]
            constant = _constant(model, name, here) if type(module) in rules else None
            found += (replace(group, constant=constant) for group in here)
    return tuple(group for group in found if group.stream or not group.wide)


def _constant(model: nn.Module, site: str, groups: Sequence[Group]) -> str | None:
    """The reader whose bias is the output of a branch that reads nothing more; None where there is more to it.

    The block is known to add the branch to its stream, right behind that reader; and all weights of the branch are its
    groups' (of norms aside), so that nothing is left to compute.
    """
    readers = {slot.owner for group in groups if group.stream and not group.wide for slot in group.readers}
    closes = any(not group.whole and not group.wide for group in groups if group.readers or group.axis == "heads")
    owners = {slot.owner for group in groups for slot in (*group.writers, *group.readers, *group.per_head)}
    weights = (f"{site}.{name}" for name, weight in model.get_submodule(site).named_parameters() if weight.ndim > 1)
    rest = [name for name in weights if name not in owners and name.rpartition(".")[0] not in owners]
    if len(readers) != 1 or not closes or rest or any(group.affine for group in groups):
        return None
    [reader] = readers
    own = reader.rpartition(".")[0] == site and getattr(owner_of(model, reader), "bias", None) is not None
    return reader if own else None


def _placed(model: nn.Module, group: Group, blocks: Blocks) -> Group:
    """A group with what the block around its branch says of the stream."""
    block = model.get_submodule(group.block)
    if isinstance(block, nn.ModuleList | nn.ModuleDict):
        return replace(group, alone=True)
    branch = (of_class(blocks, type(block)) or {}).get(group.site[len(group.block) :].lstrip("."))
    if branch is None:
        return group
    scaled = branch.scale and not isinstance(_found(block, branch.scale), nn.Identity | None)
    return replace(
        group,
        stream=f"{group.block}.{branch.norm}" if branch.norm else group.site,
        behind=f"{group.block}.{branch.behind}" if branch.behind else None,
        scale=f"{group.block}.{branch.scale}" if scaled else None,
    )


def _found(block: nn.Module, name: str) -> object:
    """What a block holds under a dotted name; None where there is nothing."""
    try:
        return owner_of(block, name)
    except AttributeError:
        return None


@dataclass(frozen=True)
class Contract:
    """What may be cut of one network, and what one image meets there.

    `positions` counts the rows (tokens, windows' padding included) that pass each owner of a weight, `pairs` the pairs
    of tokens of each attention, both for one image.
    """

    groups: tuple[Group, ...]  # in the order of the forward pass
    positions: Mapping[str, int]
    pairs: Mapping[str, int]
    streams: tuple[Stream, ...] = ()

    @cached_property
    def by_key(self) -> dict[Key, Group]:
        """The groups by site and axis."""
        return {group.key: group for group in self.groups}

    @cached_property
    def sites(self) -> dict[str, tuple[Group, ...]]:
        """The groups of each branch module."""
        return {
            site: tuple(g for g in self.groups if g.site == site) for site in dict.fromkeys(g.site for g in self.groups)
        }

    @property
    def nested(self) -> tuple[frozenset[Key], ...]:
        """For each stream the groups whose channels are its own, and may be its first ones in an order of theirs."""
        return tuple(frozenset(group.key for group in self.groups if stream.holds(group)) for stream in self.streams)

    @cached_property
    def blocks(self) -> dict[str, tuple[Group, ...]]:
        """The groups of each block."""
        names = dict.fromkeys(group.block for group in self.groups)
        return {name: tuple(group for group in self.groups if group.block == name) for name in names}
