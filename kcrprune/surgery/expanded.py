"""Pruned weights written back into a dense-shaped network: what was cut is zero there.

A network that has been cut and refitted can so be scored and cut again, on its own dense axes.
"""

from collections.abc import Sequence

import torch
from torch import nn

from kcrprune.families import BlockSite, classifiers
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.pruned import head_rows, qkv_rows
from kcrprune.surgery.swap import linear_at


@torch.no_grad()
def expand_(model: nn.Module, pruned: nn.Module, sites: Sequence[BlockSite], plan: ChannelPlan) -> nn.Module:
    """Makes the dense-shaped `model` compute what `pruned` computes; both came from the same network.

    Only the linears are written, of the blocks, between them and of the classifier: a cut and a refit change no more.
    """
    for whole, part in zip(classifiers(model), classifiers(pruned), strict=True):
        whole.load_state_dict(part.state_dict())
    for site, block in zip(sites, plan.blocks, strict=True):
        for name in site.entry:
            model.get_submodule(name).load_state_dict(pruned.get_submodule(name).state_dict())
        value = head_rows(block.heads.indices, block.attn_value, site.head_dim)
        io, hidden = block.mlp_io.indices, block.mlp_hidden.indices
        _write_(linear_at(model, site.qkv), linear_at(pruned, site.qkv), qkv_rows(site, block), range(site.width))
        _write_(linear_at(model, site.proj), linear_at(pruned, site.proj), range(site.width), value)
        _write_(linear_at(model, site.fc1), linear_at(pruned, site.fc1), hidden, io)
        _write_(linear_at(model, site.fc2), linear_at(pruned, site.fc2), io, hidden)
    return model


def _write_(whole: nn.Linear, part: nn.Linear, rows: Sequence[int], columns: Sequence[int]) -> None:
    row_index, column_index = (torch.tensor(list(index), device=whole.weight.device) for index in (rows, columns))
    whole.weight.zero_()
    whole.weight[row_index[:, None], column_index] = part.weight
    if whole.bias is not None:
        whole.bias.zero_()
        whole.bias[row_index] = part.bias
