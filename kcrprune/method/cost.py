"""What a network costs when its groups keep certain widths: exact MACs, as one polynomial read off its contract.

A linear that N rows of an image pass costs N times its kept inputs times its kept outputs; an attention its pairs of
tokens times the kept channels of all q heads and all v heads. A side of a matrix is a constant plus the kept channels
of the groups that lie in it, so integers give an integer, and expected counts an expectation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Protocol

from torch import Tensor, nn

from kcrprune.families import Contract, Group, Key
from kcrprune.plan import PER_HEAD, ChannelPlan

Widths = Mapping[Key, int]  # kept channels of one head; for `heads` kept heads


class Cost(Protocol):
    """What a budget is counted in. What one site costs does not depend on the widths of another."""

    unit: ClassVar[str]  # the word for it: MACs, time
    ahead: ClassVar[int]  # steps of a width that are weighed at once: more than one where one alone may save nothing

    @property
    def dense(self) -> int:
        """Of the whole network before any cut."""
        ...

    def of_site(self, site: str, widths: Widths) -> int:
        """What a branch costs at these widths, up to a constant."""
        ...


def dense_widths(groups: Sequence[Group]) -> dict[Key, int]:
    """What groups have before any cut."""
    return {group.key: group.width for group in groups}


def plan_widths(plan: ChannelPlan) -> dict[Key, int]:
    """What a plan leaves of them."""
    heads: dict[Key, int] = {
        (kept.site, "heads"): len(kept.kept_heads) for kept in plan.groups if kept.axis in PER_HEAD
    }
    return {kept.key: kept.kept_width for kept in plan.groups} | heads


def with_width(widths: Widths, key: Key, width: int) -> dict[Key, int]:
    """A copy in which one group has another width."""
    return {**widths, key: width}


@dataclass(frozen=True)
class Side:
    """The size of one side of a matrix: a constant, and so many times the kept channels of each of some groups."""

    constant: int
    times: Mapping[Key, int] = field(default_factory=dict)

    def at(self, counts: Mapping[Key, int]) -> int:
        """The size at these counts of kept channels (of all heads together)."""
        return self.constant + sum(times * counts[key] for key, times in self.times.items())


@dataclass(frozen=True)
class Term:
    """Rows of an image times two sides."""

    rows: int
    left: Side
    right: Side


@dataclass(frozen=True)
class MacCost:
    """Multiply-accumulates of one image, exactly."""

    unit: ClassVar[str] = "MACs"
    ahead: ClassVar[int] = 1  # several steps, of one width or of several, save no more than each by itself

    dense: int
    contract: Contract
    terms: Mapping[str, tuple[Term, ...]]  # by site

    @classmethod
    def of(cls, model: nn.Module, contract: Contract, dense: int) -> "MacCost":
        """That of a dense network which was counted to cost `dense`."""
        return cls(dense, contract, {site: tuple(_terms(model, contract, site)) for site in contract.sites})

    def of_site(self, site: str, widths: Widths) -> int:
        """MACs of the products of one branch."""
        counts = {group.key: kept_count(group, widths) for group in self.contract.sites[site]}
        return sum(term.rows * term.left.at(counts) * term.right.at(counts) for term in self.terms[site])

    def predicted(self, plan: ChannelPlan) -> int:
        """MACs of the network that a plan leaves; equal to the counted MACs of the cut network, as integers."""
        dense, kept = dense_widths(self.contract.groups), plan_widths(plan)
        return self.dense - sum(self.of_site(site, dense) - self.of_site(site, kept) for site in self.terms)

    def channel(self, group: Group) -> int:
        """MACs that one gate of a group holds while everything else is whole."""
        widths = dense_widths(self.contract.sites[group.site])
        less = with_width(widths, group.key, group.width - group.span)
        return (self.of_site(group.site, widths) - self.of_site(group.site, less)) // group.heads


def kept_count(group: Group, widths: Widths) -> int:
    """Kept channels of all kept heads of a group; of the axis `heads`, kept heads."""
    return widths[group.key] * (widths[group.site, "heads"] if group.axis in PER_HEAD else 1)


def _terms(model: nn.Module, contract: Contract, site: str) -> Iterator[Term]:
    groups = contract.sites[site]
    sides: dict[tuple[str, int], dict[Key, int]] = {}
    for group in groups:
        for slot in (*group.writers, *group.readers, *group.per_head):
            side = sides.setdefault((slot.owner, slot.dim), {})
            side[group.key] = side.get(group.key, 0) + 1
    for owner in dict.fromkeys(owner for owner, _ in sides):
        if owner in contract.positions:
            weight = model.get_submodule(owner).weight
            assert isinstance(weight, Tensor)
            yield Term(
                contract.positions[owner] * prod(weight.shape[2:]),
                *(_side(weight.shape[dim], sides.get((owner, dim), {}), contract) for dim in (0, 1)),
            )
    if site in contract.pairs:
        times = {group.key: group.products for group in groups if group.axis in PER_HEAD}
        yield Term(contract.pairs[site], Side(0, times), Side(1))


def _side(size: int, times: dict[Key, int], contract: Contract) -> Side:
    whole = sum(count * contract.by_key[key].heads * contract.by_key[key].width for key, count in times.items())
    return Side(size - whole, times)
