"""Dense to pruned: matrices shrink as a plan says; no mask remains.

Letters: D width of the residual stream, I channels that the MLP reads and writes, H hidden units, h heads,
d channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kcrprune.errors import PlanMismatchError
from kcrprune.families import AttentionWidths, BlockSite, family_of
from kcrprune.plan import BlockPlan, ChannelPlan, Kept
from kcrprune.surgery.swap import linear_at, swap_


class GatherLinear(nn.Linear):
    """A linear over some channels of its input; `index` (I,) says which."""

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Sequence[int]) -> None:
        super().__init__(len(index), linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("index", torch.tensor(index, device=linear.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., out)."""
        return super().forward(input.index_select(-1, self.index))


class ScatterLinear(nn.Linear):
    """A linear that writes some channels of its output and zero to the others.

    `index` (D,) names for every output channel the row that writes it, or I for none: the rows are padded by one
    zero channel and gathered, so that an exported graph has a Gather and no Scatter.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, rows: Sequence[int], width: int) -> None:
        super().__init__(linear.in_features, len(rows), linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        index = torch.full((width,), len(rows), device=linear.weight.device)
        index[list(rows)] = torch.arange(len(rows), device=index.device)
        self.register_buffer("index", index)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., D)."""
        rows = super().forward(input)  # (..., I)
        return nn.functional.pad(rows, (0, 1)).index_select(-1, self.index)


def full_plan(model: nn.Module, architecture: str) -> ChannelPlan:
    """The plan that keeps everything of a dense model."""
    return ChannelPlan(
        architecture=architecture, blocks=tuple(keep_all(site) for site in family_of(model).sites(model))
    )


def keep_all(site: BlockSite) -> BlockPlan:
    """The part of a plan that leaves one block whole."""
    per_head = (Kept.all_of(site.head_dim),) * site.heads
    return BlockPlan(
        site=site.name,
        mlp_io=Kept.all_of(site.width),
        mlp_hidden=Kept.all_of(site.hidden),
        heads=Kept.all_of(site.heads),
        attn_query=per_head,
        attn_value=per_head,
    )


def apply_plan_(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Cuts a dense model down to a plan, in place, and returns it.

    PlanMismatchError where the plan was made for other blocks or widths; the model is then untouched.
    """
    family = family_of(model)
    sites = family.sites(model)
    _check(sites, plan)
    for site, block in zip(sites, plan.blocks, strict=True):
        _cut_mlp_(model, site, block)
        if not (block.heads.is_all and all(kept.is_all for kept in (*block.attn_query, *block.attn_value))):
            _cut_attention_(model, site, block)
            widths = AttentionWidths(block.heads.indices, block.widths["attn_query"], block.widths["attn_value"])
            name = f"{site.name}.{site.attn}"
            swap_(model, name, family.prune_attention(model.get_submodule(name), widths))
    return model


def _check(sites: Sequence[BlockSite], plan: ChannelPlan) -> None:
    names, planned = [site.name for site in sites], [block.site for block in plan.blocks]
    if names != planned:
        raise PlanMismatchError(
            f"the plan was made for {plan.architecture!r} with {len(planned)} blocks, this network has {len(names)}"
        )
    for site, block in zip(sites, plan.blocks, strict=True):
        made_for = (block.mlp_io, block.mlp_hidden, block.heads, block.attn_query[0], block.attn_value[0])
        widths = (site.width, site.hidden, site.heads, site.head_dim, site.head_dim)
        if tuple(kept.width for kept in made_for) != widths:
            raise PlanMismatchError(
                f"block {site.name!r}: the plan of {plan.architecture!r} is for widths "
                f"{tuple(kept.width for kept in made_for)}, this network has {widths}"
            )


def _cut_mlp_(model: nn.Module, site: BlockSite, block: BlockPlan) -> None:
    fc1, fc2 = linear_at(model, site.fc1), linear_at(model, site.fc2)
    hidden, io = block.mlp_hidden, block.mlp_io
    if not (hidden.is_all and io.is_all):
        fc1 = take(fc1, rows=hidden.indices, columns=io.indices)
        fc2 = take(fc2, rows=io.indices, columns=hidden.indices)
        swap_(model, site.fc1, fc1 if io.is_all else GatherLinear(fc1, io.indices))
        swap_(model, site.fc2, fc2 if io.is_all else ScatterLinear(fc2, io.indices, site.width))


def _cut_attention_(model: nn.Module, site: BlockSite, block: BlockPlan) -> None:
    value = head_rows(block.heads.indices, block.attn_value, site.head_dim)
    swap_(model, site.qkv, take(linear_at(model, site.qkv), rows=qkv_rows(site, block)))
    swap_(model, site.proj, take(linear_at(model, site.proj), columns=value))


def qkv_rows(site: BlockSite, block: BlockPlan) -> list[int]:
    """Rows of the dense qkv that a plan keeps: those of q, of k, of v."""
    query = head_rows(block.heads.indices, block.attn_query, site.head_dim)
    value = head_rows(block.heads.indices, block.attn_value, site.head_dim)
    inner = site.heads * site.head_dim  # rows of q, of k and of v in the dense qkv
    return [*query, *(inner + row for row in query), *(2 * inner + row for row in value)]


def head_rows(heads: Sequence[int], kept: Sequence[Kept], head_dim: int) -> list[int]:
    """Positions in (h * d) of the kept channels of the kept heads."""
    return [
        head * head_dim + channel for head, channels in zip(heads, kept, strict=True) for channel in channels.indices
    ]


def take(linear: nn.Linear, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> nn.Linear:
    """A new linear with some rows (outputs) and columns (inputs) of `linear`."""
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        index = torch.tensor(rows, device=weight.device)
        weight, bias = weight[index], None if bias is None else bias.detach()[index]
    if columns is not None:
        weight = weight[:, torch.tensor(columns, device=weight.device)]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new
