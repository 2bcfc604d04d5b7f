"""Which attentions can be cut: for each class where its channels lie, and how its slim form makes q, k and v."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from kcrprune.families.contract import Basis, Group, Rule, Slot, Tie
from kcrprune.families.slim import SlimAttention
from kcrprune.plan import PER_HEAD, Axis

LARGEST_TEMPERATURE: Final = math.log(100)  # Swin V2's clamp of its learned logit scale


class SlimPlain(SlimAttention, Attention):
    """timm's Attention: ViT, DeiT, DINOv2."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002 (timm calls it)
        """Self-attention over (B, N, D)."""
        q, k, v = self.split(self.qkv(x))
        attended = self.norm(self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal))
        return self.project(self.weighed(x, attended))


class SlimWindow(SlimAttention, WindowAttention):
    """Swin's attention inside windows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention inside each window over (B * windows, N, D), `mask` (windows, N, N)."""
        q, k, v = self.split(self.qkv(x))
        return self.project(self.attend_in_windows(q * self.scale, k, v, self._get_rel_pos_bias()[0], mask))


class SlimWindowV2(SlimAttention, WindowAttentionV2):
    """Swin V2's cosine attention inside windows; closed channels are in no norm of q and k."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention inside each window over (B * windows, N, D), `mask` (windows, N, N)."""
        q, k, v = self.split(with_biases(self, x))
        q = unit(self, q) * self.logit_scale.clamp(max=LARGEST_TEMPERATURE).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return self.project(self.attend_in_windows(q, unit(self, k), v, bias, mask))


def unit(slim: SlimAttention, x: Tensor) -> Tensor:
    """The vectors of x (B, h, N, d) over its length in the channels that are open."""
    if slim.query_gate is None:
        return F.normalize(x, dim=-1)
    return x * (x * slim.gated(x)).sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


class Rotary(SlimAttention):
    """Attention with rotary positions; what EVA's and timm's own have in common."""

    qkv: nn.Linear | None
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    num_prefix_tokens: int
    rotate_half: bool

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002 (timm calls it)
    ) -> Tensor:
        """Self-attention over (B, N, D); `rope` (N without prefix, 2 d), or (h, N without prefix, 2 d)."""
        if self.qkv is None:
            parts: Any = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (self.by_head(part(x)) for part in parts)
        else:
            q, k, v = self.split(with_biases(self, x))
        q, k = (self.turned(part, rope) for part in (self.q_norm(q), self.k_norm(k)))
        return self.project(self.weighed(x, self.norm(self.attend(q, k, v, attn_mask, is_causal=is_causal))))

    def turned(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """The vectors of x (B, h, N, query_dim) with the rotations of the channels that it keeps."""
        if rope is None:
            return x
        if self.channels is not None:
            rope = self._kept(rope)
        prefix, rest = x.split([self.num_prefix_tokens, x.shape[2] - self.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], dim=2)

    def _kept(self, rope: Tensor) -> Tensor:
        assert self.kept_heads is not None
        assert self.channels is not None
        halves = rope.chunk(2, dim=-1)  # sines and cosines, (N, d) or (dense h, N, d)
        if rope.ndim == 2:
            return torch.cat([half[:, self.channels].transpose(0, 1) for half in halves], dim=-1)
        index = self.channels[:, None].expand(-1, rope.shape[-2], -1)
        return torch.cat([half.index_select(-3, self.kept_heads).gather(-1, index) for half in halves], dim=-1)


class SlimEva(Rotary, EvaAttention):
    """EVA-02's and DINOv3's attention."""


class SlimRope(Rotary, AttentionRope):
    """timm's attention with rotary positions: PE, RoPE-ViT, Sapiens, the encoders of Qwen and DeepSeek."""


def with_biases(attention: Any, x: Tensor) -> Tensor:
    """q, k and v side by side, from a linear whose biases lie beside it, if there are any."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)
    return attention.qkv(x) + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def attention_rule(
    q: str = "qkv:0 q_proj q_bias",
    k: str = "qkv:1 k_proj k_bias",
    v: str = "qkv:2 v_proj v_bias",
    *,
    norm: str = "norm",
    per_head: tuple[Slot, ...] = (),
    basis: Basis = "free",
    tie: Callable[[Any], Tie] = lambda attention: "",
    only: Callable[[Any], tuple[Axis, ...]] = lambda attention: (*PER_HEAD, "heads"),
) -> Rule:
    """The rule of an attention that ends in a linear `proj`, whose inputs are the channels of its heads side by side.

    `q`, `k` and `v` name the owners that write each: `qkv:1` is the second part of an owner of several, and what a
    module lacks is no owner; `norm` is one before `proj`. `only` says which axes may be cut where not all may.
    """

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        attention: Any = module
        if not isinstance(attention.proj, nn.Linear) or getattr(attention, "num_kv_groups", 1) > 1:
            return ()
        heads, width = attention.num_heads, attention.proj.in_features // attention.num_heads

        slots = partial(_slots, site, attention, heads, width)
        open_ = only(attention)
        turns = _absent(attention, "q_norm") and _absent(attention, "k_norm") and "attn_query" in open_
        bare = _absent(attention, norm) and _absent(attention, "gate")  # proj reads what attention makes
        query = Group(site, "attn_query", heads, width, slots(q) + slots(k), tie=tie(attention), whole=not turns)
        return (
            replace(query, basis=basis if turns else "fixed"),
            Group(
                site,
                "attn_value",
                heads,
                width,
                slots(f"{v} gate {norm}"),
                (Slot(f"{site}.proj", 1, 0, width),),
                norm=None if _absent(attention, norm) else f"{site}.{norm}",
                basis="free" if bare and "attn_value" in open_ else "fixed",
                whole="attn_value" not in open_,
            ),
            Group(
                site,
                "heads",
                1,
                heads,
                per_head=tuple(slot.below(site) for slot in per_head if not _absent(attention, slot.owner)),
                whole="heads" not in open_,
            ),
        )

    return groups


def _slots(site: str, attention: nn.Module, heads: int, width: int, words: str) -> tuple[Slot, ...]:
    """The slots of the owners that an attention has, each named with the part of it, as `qkv:1`."""
    parts = [word.partition(":") for word in words.split()]
    return tuple(
        Slot(f"{site}.{name}", 0, int(part or 0) * heads * width, width)
        for name, _, part in parts
        if not _absent(attention, name)
    )


def _absent(module: nn.Module, name: str) -> bool:
    """Whether a module has nothing of that dotted name, or nothing that does anything."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return isinstance(found, nn.Identity | None)


def pairs_of(attention: Any) -> Tie:
    """Which channels rotary positions turn together."""
    return "halves" if attention.rotate_half else "neighbours"


SLIM_ATTENTIONS: Final[dict[type, type[SlimAttention]]] = {
    Attention: SlimPlain,
    WindowAttention: SlimWindow,
    WindowAttentionV2: SlimWindowV2,
    EvaAttention: SlimEva,
    AttentionRope: SlimRope,
}
ATTENTIONS: Final[dict[type, Rule]] = {
    Attention: attention_rule(),
    WindowAttention: attention_rule(per_head=(Slot("relative_position_bias_table", 1),)),
    WindowAttentionV2: attention_rule(per_head=(Slot("logit_scale", 0), Slot("cpb_mlp.2", 0)), basis="orthogonal"),
    EvaAttention: attention_rule(basis="fixed", tie=pairs_of),
    AttentionRope: attention_rule(basis="fixed", tie=pairs_of),
}
