"""timm's VisionTransformer: ViT, DeiT, distilled DeiT, DeiT-III, DINOv2 with and without registers.

What is unusual: q, k and v of a pruned attention may have two widths, which timm's forward cannot express, so
PrunedAttention stands in for timm's Attention; everything else keeps timm's forward.
"""

from typing import Any, cast

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from kcrprune.families.base import AttentionWidths, BlockSite, Family
from kcrprune.plan import Axis


def refusal(model: nn.Module) -> str | None:
    """The reason why this VisionTransformer cannot be cut, or None."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return f"{type(model).__name__} changes timm's VisionTransformer in ways that kcrprune does not know"
    for name, block in cast(VisionTransformer, model).blocks.named_children():
        if type(block) is not Block:
            return f"blocks.{name} is a {type(block).__name__}, and only timm's pre-norm Block can be cut"
        if type(block.mlp) is not Mlp:
            return f"blocks.{name}.mlp is a {type(block.mlp).__name__}, and only a plain two-layer Mlp can be cut"
        if type(block.attn) is not Attention:
            return f"blocks.{name}.attn is a {type(block.attn).__name__}, and only timm's Attention can be cut"
        if block.attn.gate is not None:
            return f"blocks.{name}.attn gates its output, which no axis of kcrprune knows"
    return None


def sites(model: nn.Module) -> tuple[BlockSite, ...]:
    """Every block, from the input to the head."""
    model = cast(VisionTransformer, model)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return tuple(_site(f"blocks.{index}", block, tokens) for index, block in enumerate(model.blocks))


def _site(name: str, block: Any, tokens: int) -> BlockSite:
    plain_query = isinstance(block.attn.q_norm, nn.Identity) and isinstance(block.attn.k_norm, nn.Identity)
    plain_value = isinstance(block.attn.norm, nn.Identity)
    plain_hidden = isinstance(block.mlp.norm, nn.Identity)
    allowed: dict[Axis, bool] = {
        "mlp_io": True,
        "mlp_hidden": plain_hidden,  # a norm over the hidden units sees how many there are
        "attn_query": plain_query,  # likewise a norm over the channels of a head
        "attn_value": plain_value,
        "heads": plain_value,
    }
    return BlockSite(
        name=name,
        width=block.mlp.fc1.in_features,
        hidden=block.mlp.fc1.out_features,
        heads=block.attn.num_heads,
        head_dim=block.attn.head_dim,
        tokens=tokens,
        attn_tokens=tokens,
        window_tokens=tokens,
        axes=tuple(axis for axis, is_allowed in allowed.items() if is_allowed),
        rotate_query=plain_query,
        rotate_value=plain_value,
        scale1=None if isinstance(block.ls1, nn.Identity) else "ls1",
        scale2=None if isinstance(block.ls2, nn.Identity) else "ls2",
    )


class PrunedAttention(nn.Module):
    """timm's Attention whose q/k and v widths differ; the state-dict keys and the softmax scale are the dense ones."""

    def __init__(self, dense: Attention, widths: AttentionWidths) -> None:
        super().__init__()
        self.num_heads = len(widths.heads)
        self.query_dim = widths.query_dim
        self.value_dim = widths.value_dim
        self.scale = dense.scale
        self.qkv = dense.qkv
        self.q_norm = dense.q_norm
        self.k_norm = dense.k_norm
        self.attn_drop = dense.attn_drop
        self.norm = dense.norm
        self.proj = dense.proj
        self.proj_drop = dense.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002 (timm calls it)
        """Self-attention over (batch, N, D)."""
        query, value = self.num_heads * self.query_dim, self.num_heads * self.value_dim
        q, k, v = self.qkv(x).split([query, query, value], dim=-1)
        q = self.q_norm(self._by_head(q, self.query_dim))  # (batch, h, N, query_dim)
        k = self.k_norm(self._by_head(k, self.query_dim))
        v = self._by_head(v, self.value_dim)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        x = self.norm(x.transpose(1, 2).flatten(2))  # (batch, N, h * value_dim)
        return self.proj_drop(self.proj(x))

    def _by_head(self, x: Tensor, dim: int) -> Tensor:
        return x.unflatten(-1, (self.num_heads, dim)).transpose(1, 2)


def prune_attention(attention: nn.Module, widths: AttentionWidths) -> nn.Module:
    """A pruned attention around the linears and norms of `attention`."""
    return PrunedAttention(cast(Attention, attention), widths)


VIT = Family("vit", VisionTransformer, refusal, sites, prune_attention)
__all__ = ["VIT", "PrunedAttention"]
