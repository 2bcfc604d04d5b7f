"""Attentions of hybrid networks that can be cut: LeViT and its relatives, PVT, MaxViT, CoAtNet, CAFormer."""

from typing import Any, Final

from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.levit import Attention as LevitAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from torch import Tensor, nn

from kcrprune.families.attentions import attention_rule
from kcrprune.families.contract import Basis, Group, Rule, Slot
from kcrprune.families.slim import SlimAttention

NO_DROPOUT: Final = nn.Dropout(0.0)


class SlimByHead(SlimAttention):
    """What LeViT's relatives share: q, k and v side by side inside each head, and a table of biases."""

    attn_drop = NO_DROPOUT
    key_dim: int
    val_dim: int
    attention_biases: Tensor
    attention_bias_idxs: Tensor

    def dense_widths(self) -> tuple[int, int]:
        """Values may be wider than keys."""
        return self.key_dim, self.val_dim

    def made(self, x: Tensor) -> Tensor:
        """q, k and v (B, N, h * (2 query_dim + value_dim))."""
        qkv: Any = self.qkv
        return qkv(x)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        q, k, v = self.by_head(self.made(x)).split([self.query_dim, self.query_dim, self.value_dim], dim=-1)
        return self.proj(self.attend(q, k, v, self.attention_biases[:, self.attention_bias_idxs]))


class SlimLevit(SlimByHead, LevitAttention):
    """LeViT's, with batch norms behind its linears."""


class SlimEfficientFormer(SlimByHead, EfficientFormerAttention):
    """EfficientFormer's, in its last blocks."""


class SlimTinyVit(SlimByHead, TinyVitAttention):
    """TinyViT's inside windows, with a norm of its own."""

    def made(self, x: Tensor) -> Tensor:
        """Behind the norm."""
        return super().made(self.norm(x))


class SlimPvt(SlimAttention, PvtAttention):
    """PVT v2's, whose keys and values see a smaller map."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """Self-attention over (B, N, D) of a map of that size."""
        q = self.by_head(self.q(x))
        if self.sr is not None:
            assert self.norm is not None
            x = x.transpose(1, 2).unflatten(2, tuple(feat_size))
            x = self.norm(self.sr(x if self.pool is None else self.pool(x)).flatten(2).transpose(1, 2))
            x = x if self.act is None else self.act(x)
        kv = self.kv(x).split([self.num_heads * self.query_dim, self.num_heads * self.value_dim], dim=-1)
        return self.project(self.attend(q, *map(self.by_head, kv)))


class SlimMetaFormer(SlimAttention, MetaFormerAttention):
    """CAFormer's."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        return self.project(self.attend(*self.split(self.qkv(x))))


class SlimMaxVit(SlimAttention, AttentionCl):
    """MaxViT's inside windows or grids."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Self-attention over (B * windows, H, W, D), or over any other shape of tokens."""
        attended = _attended(self, self.qkv(x.flatten(1, -2)), shared_rel_pos)
        return self.project(attended).view(*x.shape[:-1], -1)


class SlimCoAtNet(SlimAttention, Attention2d):
    """CoAtNet's, over all positions of a map."""

    def dense_widths(self) -> tuple[int, int]:
        """By the convolutions that it is made of."""
        return self.dim_head, self.dim_head

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Self-attention over (B, D, H, W)."""
        attended = _attended(self, self.qkv(x).flatten(2).transpose(1, 2), shared_rel_pos)
        return self.project(attended.transpose(1, 2).unflatten(-1, x.shape[2:]))


def _attended(attention: Any, qkv: Tensor, shared: Tensor | None) -> Tensor:
    """What MaxViT's attentions make of q, k and v (B, N, ...), inside each head or side by side."""
    if attention.head_first:
        query, value = attention.query_dim, attention.value_dim
        q, k, v = attention.by_head(qkv).split([query, query, value], dim=-1)
    else:
        q, k, v = attention.split(qkv)
    return attention.attend(q, k, v, shared if attention.rel_pos is None else attention.rel_pos.get_bias())


def _by_head(linear: str, reader: str, *, norm: str = "", affine: str = "", basis: Basis = "free") -> Rule:
    """The rule of an attention whose `linear` makes q, k and v inside each head; `norm` is a batch norm behind it."""

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        attention: Any = module
        if getattr(attention, "use_conv", False):
            return ()
        heads, keys, values = attention.num_heads, attention.key_dim, attention.val_dim
        owners = [f"{site}.{name}" for name in (linear, norm) if name]

        def slots(start: int) -> tuple[Slot, ...]:
            return tuple(Slot(owner, 0, start, 2 * keys + values) for owner in owners)

        return (
            Group(site, "attn_query", heads, keys, slots(0) + slots(keys), basis=basis),
            Group(
                site,
                "attn_value",
                heads,
                values,
                slots(2 * keys),
                (Slot(f"{site}.{reader}", 1, 0, values),),
                basis=basis,
                affine=f"{site}.{affine}" if affine else None,
            ),
            Group(site, "heads", 1, heads, per_head=(Slot(f"{site}.attention_biases", 0),)),
        )

    return groups


def _maxvit(site: str, module: nn.Module) -> tuple[Group, ...]:
    """The positions of all heads are made together, so that heads stay."""
    attention: Any = module
    heads, width = attention.num_heads, attention.dim_head
    step, stride = (width, 3 * width) if attention.head_first else (heads * width, width)
    q, k, v = (Slot(f"{site}.qkv", 0, part * step, stride) for part in range(3))
    return (
        Group(site, "attn_query", heads, width, (q, k)),
        Group(site, "attn_value", heads, width, (v,), (Slot(f"{site}.proj", 1, 0, width),)),
        Group(site, "heads", 1, heads, whole=True),
    )


SLIM_HYBRIDS: Final[dict[type, type[SlimAttention]]] = {
    Attention2d: SlimCoAtNet,
    AttentionCl: SlimMaxVit,
    EfficientFormerAttention: SlimEfficientFormer,
    LevitAttention: SlimLevit,
    MetaFormerAttention: SlimMetaFormer,
    PvtAttention: SlimPvt,
    TinyVitAttention: SlimTinyVit,
}
HYBRIDS: Final[dict[type, Rule]] = {
    Attention2d: _maxvit,
    AttentionCl: _maxvit,
    EfficientFormerAttention: _by_head("qkv", "proj"),
    LevitAttention: _by_head("qkv.linear", "proj.ln.linear", norm="qkv.bn", affine="proj.ln.bn", basis="fixed"),
    MetaFormerAttention: attention_rule(norm=""),
    PvtAttention: attention_rule("q", "kv:0", "kv:1", norm=""),
    TinyVitAttention: _by_head("qkv", "proj"),
}
