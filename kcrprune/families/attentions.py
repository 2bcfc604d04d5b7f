"""Which attentions can be cut: for each class where its channels lie, and how its slim form makes q, k and v."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from kcrprune.families.contract import Basis, Group, Rule, Slot, Tie
from kcrprune.families.slim import SlimAttention

LARGEST_TEMPERATURE: Final = math.log(100)  # Swin V2's clamp of its learned logit scale


class SlimPlain(SlimAttention, Attention):
    """timm's Attention: ViT, DeiT, DINOv2."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002 (timm calls it)
        """Self-attention over (B, N, D)."""
        q, k, v = self.split(self.qkv(x))
        return self.project(self.norm(self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal)))


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
        q, k, v = self.split(_with_biases(self, x))
        q = self.unit(q) * self.logit_scale.clamp(max=LARGEST_TEMPERATURE).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return self.project(self.attend_in_windows(q, self.unit(k), v, bias, mask))

    def unit(self, x: Tensor) -> Tensor:
        """The vectors of x (B, h, N, d) over its length in the channels that are open."""
        if self.query_gate is None:
            return F.normalize(x, dim=-1)
        return x * (x * self.gated(x)).sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


class SlimEva(SlimAttention, EvaAttention):
    """EVA-02's and DINOv3's attention with rotary positions."""

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
            q, k, v = self.split(_with_biases(self, x))
        q, k = (self.turned(part, rope) for part in (self.q_norm(q), self.k_norm(k)))
        return self.project(self.norm(self.attend(q, k, v, attn_mask, is_causal=is_causal)))

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


def _with_biases(attention: Any, x: Tensor) -> Tensor:
    """q, k and v side by side, from a linear whose biases lie beside it."""
    if attention.q_bias is None:
        return attention.qkv(x)
    return attention.qkv(x) + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _rule(
    *,
    per_head: tuple[Slot, ...] = (),
    basis: Basis = "free",
    tie: Callable[[Any], Tie] = lambda attention: "",
) -> Rule:
    """The rule of an attention whose q, k and v lie side by side in `qkv`, or in linears of their own."""

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        attention: Any = module
        heads = attention.num_heads
        width = attention.proj.in_features // heads
        inner = heads * width
        entries = tuple(slot.below(site) for slot in per_head)

        def written(part: int, letter: str) -> tuple[Slot, ...]:
            owners = [("qkv", part * inner), (f"{letter}_proj", 0), (f"{letter}_bias", 0)]
            there = [(name, start) for name, start in owners if getattr(attention, name, None) is not None]
            return tuple(Slot(f"{site}.{name}", 0, start, width) for name, start in there)

        if getattr(attention, "gate", None) is not None:  # its output is multiplied by a gate as wide as all heads
            return ()
        plain = _absent(attention, "q_norm") and _absent(attention, "k_norm")
        norm = None if _absent(attention, "norm") else f"{site}.norm"
        value = written(2, "v") + ((Slot(norm, 0, 0, width),) if norm else ())
        return (
            Group(
                site,
                "attn_query",
                heads,
                width,
                written(0, "q") + written(1, "k"),
                tie=tie(attention),
                basis=basis if plain else "fixed",
                whole=not plain,
            ),
            Group(
                site,
                "attn_value",
                heads,
                width,
                value,
                (Slot(f"{site}.proj", 1, 0, width),),
                norm=norm,
                basis="fixed" if norm else "free",
            ),
            Group(site, "heads", 1, heads, per_head=entries),
        )

    return groups


def _absent(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Identity | None)


SLIM: Final[dict[type, type[SlimAttention]]] = {
    Attention: SlimPlain,
    WindowAttention: SlimWindow,
    WindowAttentionV2: SlimWindowV2,
    EvaAttention: SlimEva,
}
ATTENTIONS: Final[dict[type, Rule]] = {
    Attention: _rule(),
    WindowAttention: _rule(per_head=(Slot("relative_position_bias_table", 1),)),
    WindowAttentionV2: _rule(per_head=(Slot("logit_scale", 0), Slot("cpb_mlp.2", 0)), basis="orthogonal"),
    EvaAttention: _rule(basis="fixed", tie=lambda attention: "halves" if attention.rotate_half else "neighbours"),
}
