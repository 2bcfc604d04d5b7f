"""timm's SwinTransformer (the first version; V2 has cosine attention and res-post-norm and is another class).

What is unusual: attention runs on padded, shifted windows, so its token count differs from the MLP's, and its
bias table has one column a head, which goes when the head goes.
"""

from math import ceil
from typing import Any, cast

import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from kcrprune.families.base import AttentionWidths, BlockSite, Family
from kcrprune.plan import AXES


def refusal(model: nn.Module) -> str | None:
    """The reason why this SwinTransformer cannot be cut, or None."""
    if type(model) is not SwinTransformer:
        return f"{type(model).__name__} changes timm's SwinTransformer in ways that kcrprune does not know"
    for name, block in model.named_modules():
        if name.count(".") == 3 and name.split(".")[2] == "blocks":
            if type(block) is not SwinTransformerBlock:
                return f"{name} is a {type(block).__name__}, and only timm's SwinTransformerBlock can be cut"
            if type(block.attn) is not WindowAttention or type(block.mlp) is not Mlp:
                return f"{name} holds another attention or MLP than timm's"
    return None


def sites(model: nn.Module) -> tuple[BlockSite, ...]:
    """Every block of every stage, from the input to the head."""
    found = []
    for stage_index, stage in enumerate(cast(Any, model).layers):
        for index, block in enumerate(stage.blocks):
            starts_stage = index == 0 and stage_index > 0
            entry = (f"layers.{stage_index}.downsample",) if starts_stage else ()
            name = f"layers.{stage_index}.blocks.{index}"
            found.append(_site(name, block, entry))
    return tuple(found)


def _site(name: str, block: Any, entry: tuple[str, ...]) -> BlockSite:
    rows, columns = block.input_resolution
    padded_rows = ceil(rows / block.window_size[0]) * block.window_size[0]
    padded_columns = ceil(columns / block.window_size[1]) * block.window_size[1]
    heads = block.attn.num_heads
    return BlockSite(
        name=name,
        width=block.mlp.fc1.in_features,
        hidden=block.mlp.fc1.out_features,
        heads=heads,
        head_dim=block.attn.proj.in_features // heads,
        tokens=rows * columns,
        attn_tokens=padded_rows * padded_columns,
        window_tokens=block.window_area,
        axes=AXES,
        entry=entry,
    )


class PrunedWindowAttention(nn.Module):
    """timm's WindowAttention whose q/k and v widths differ; state-dict keys and softmax scale are the dense ones."""

    relative_position_index: Tensor

    def __init__(self, dense: WindowAttention, widths: AttentionWidths) -> None:
        super().__init__()
        self.num_heads = len(widths.heads)
        self.query_dim = widths.query_dim
        self.value_dim = widths.value_dim
        self.scale = dense.scale
        self.window_area = dense.window_area
        table = dense.relative_position_bias_table.detach()[:, list(widths.heads)].clone()
        self.relative_position_bias_table = nn.Parameter(table)  # (offsets, h)
        index = cast(Tensor, dense.relative_position_index)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = dense.qkv
        self.attn_drop = dense.attn_drop
        self.proj = dense.proj
        self.proj_drop = dense.proj_drop

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention inside each window over (batch * windows, T, D), `mask` (windows, T, T)."""
        query, value = self.num_heads * self.query_dim, self.num_heads * self.value_dim
        q, k, v = self.qkv(x).split([query, query, value], dim=-1)
        q = self._by_head(q, self.query_dim) * self.scale  # (batch * windows, h, T, query_dim)
        scores = q @ self._by_head(k, self.query_dim).transpose(-2, -1) + self._position_bias()
        if mask is not None:
            windows, tokens = mask.shape[0], mask.shape[1]
            scores = scores.view(-1, windows, self.num_heads, tokens, tokens) + mask[:, None]
            scores = scores.view(-1, self.num_heads, tokens, tokens)
        x = self.attn_drop(F.softmax(scores, dim=-1)) @ self._by_head(v, self.value_dim)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _by_head(self, x: Tensor, dim: int) -> Tensor:
        return x.unflatten(-1, (self.num_heads, dim)).transpose(1, 2)

    def _position_bias(self) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return bias.view(self.window_area, self.window_area, -1).permute(2, 0, 1)  # (h, T, T)


def prune_attention(attention: nn.Module, widths: AttentionWidths) -> nn.Module:
    """A pruned window attention around the linears and the bias table of `attention`."""
    return PrunedWindowAttention(cast(WindowAttention, attention), widths)


SWIN = Family("swin", SwinTransformer, refusal, sites, prune_attention)
