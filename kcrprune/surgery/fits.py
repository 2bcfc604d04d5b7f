"""Which linears of a block a refit fits, in which order, and to what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kcrprune.families import Group, owner_of
from kcrprune.families.linears import is_linear
from kcrprune.surgery.narrow import IndexMap


@dataclass(frozen=True)
class Fit:
    """One linear of a block: what of its dense outputs it keeps, and which stream it brings back; names in a Block."""

    name: str
    rows: Tensor | None = None
    norm: str | None = None  # a batch norm right behind it
    site: str = ""
    before: str | None = None  # the norm that the branch reads the stream through; None: fit to its own dense output
    behind: str | None = None  # the next norm, whose input is the stream with the branch; None: the block's output
    scale: str | None = None


def fits_of(dense: nn.Module, block: str, groups: Sequence[Group], rows: Mapping[str, Tensor]) -> Iterator[Fit]:
    """The linears of one block in the order of the forward pass: of each branch its writers, then its readers.

    Their names are those in a Block; without a block, those in the network.
    """

    def inside(name: Any) -> Any:
        return f"inside{name.removeprefix(block)}" if name and block else name

    for site in dict.fromkeys(group.site for group in groups):
        here = [group for group in groups if group.site == site and not group.wide]
        readers = {group.readers[0].owner: group for group in here if group.readers and group.block == block}
        norms = _batch_norms(dense, here)
        for owner in _linears(dense, here):
            fit = Fit(inside(owner), rows.get(f"{owner}.weight"), inside(norms.get(owner)))
            if fit.rows is not None and len(fit.rows) == 0:
                continue  # it went with its branch
            if group := readers.get(owner):
                fit = replace(
                    fit,
                    site=inside(site),
                    before=inside(group.stream),
                    behind=inside(group.behind),
                    scale=inside(group.scale),
                )
            yield fit


def _linears(dense: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Those that write or read the channels of some groups, in the order in which the network lists them."""
    owners = {slot.owner for group in groups for slot in (*group.writers, *group.readers)}
    return [name for name, module in dense.named_modules() if name in owners and is_linear(module)]


def _batch_norms(dense: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
    """The batch norm right behind each linear that has one."""
    found = {group.readers[0].owner: group.affine for group in groups if group.readers and group.affine}
    behind = [pair for group in groups for pair in pairwise(slot.owner for slot in group.writers)]
    return found | {owner: norm for owner, norm in behind if isinstance(owner_of(dense, norm), BatchNorm)}


def rows_of(kept: IndexMap, device: torch.device) -> dict[str, Tensor]:
    """Which rows are kept of the tensors that lose some; all of them are moved at once."""
    rows = {name: dims[0] for name, dims in kept.items() if 0 in dims}
    every = torch.tensor([row for of_one in rows.values() for row in of_one], dtype=torch.long, device=device)
    return dict(zip(rows, every.split([len(of_one) for of_one in rows.values()]), strict=True))
