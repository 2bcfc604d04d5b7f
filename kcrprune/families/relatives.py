"""Attentions of ViT's relatives that can be cut: relative positions, class tokens, windows of other shapes, pooling."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.convit import GPSA, MHSA
from timm.models.crossvit import CrossAttention
from timm.models.davit import WindowAttention as DavitAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.nest import Attention as NestAttention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.tnt import Attention as TntAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from timm.models.volo import Attention as VoloAttention
from timm.models.volo import ClassAttention
from torch import Tensor, nn

from kcrprune.families.attentions import LARGEST_TEMPERATURE, attention_rule, unit, with_biases
from kcrprune.families.contract import Group, Rule, Slot
from kcrprune.families.slim import SlimAttention
from kcrprune.plan import PER_HEAD, Axis


class SlimBeit(SlimAttention, BeitAttention):
    """BEiT's attention: biases beside the linear, positions of its own or shared by all blocks."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Self-attention over (B, N, D); the shared bias is (1, dense h, N, N)."""
        bias = self.of_kept_heads(shared_rel_pos_bias)
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias() + (0 if bias is None else bias)
        q, k, v = self.split(with_biases(self, x))
        return self.project(self.attend(q, k, v, bias))


class SlimRelPos(SlimAttention, RelPosAttention):
    """ViT's attention with relative positions."""

    def narrow_(self, heads: Sequence[int], query: Sequence[Sequence[int]], value_dim: int) -> None:
        """The positions are told how many heads there are."""
        super().narrow_(heads, query, value_dim)
        tell_positions_(self.rel_pos, len(heads))

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Self-attention over (B, N, D); the shared bias is (1, dense h, N, N)."""
        q, k, v = self.split(self.qkv(x))
        own: Any = self.rel_pos
        bias = self.of_kept_heads(shared_rel_pos) if own is None else own.get_bias()
        return self.project(self.attend(self.q_norm(q), self.k_norm(k), v, bias))


def tell_positions_(positions: Any, heads: int) -> None:
    """Timm's modules of relative positions keep the number of heads in shapes of their own."""
    if positions is not None:
        positions.bias_shape = (*positions.bias_shape[:2], heads)
        positions.num_heads = heads


class SlimSam(SlimAttention, SamAttention):
    """SAM's attention, whose tables of positions are read by q and shared by all heads."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, H, W, D)."""
        q, k, v = self.split(self.qkv(x.flatten(1, 2)))
        q, k = self.q_norm(q), self.k_norm(k)
        sides, bias = (x.shape[1], x.shape[2]), None
        if self.use_rel_pos:
            bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, sides, sides)
            bias = bias.unflatten(0, q.shape[:2])
        return self.project(self.attend(q, k, v, bias)).unflatten(1, sides)


class SlimWindowCr(SlimAttention, WindowMultiHeadAttention):
    """The cosine attention of timm's own Swin V2."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention inside each window over (B * windows, N, D), `mask` (windows, N, N)."""
        q, k, v = self.split(self.qkv(x))
        q = unit(self, q) * self.logit_scale.clamp(max=LARGEST_TEMPERATURE).exp()[:, None, None]
        return self.project(self.attend_in_windows(q, unit(self, k), v, self._relative_positional_encodings()[0], mask))


class SlimTalking(SlimAttention, TalkingHeadAttn):
    """CaiT's attention, whose heads are mixed before and after the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        q, k, v = self.split(self.qkv(x))
        scores = (self.gated(q) * self.scale) @ k.transpose(-2, -1)
        scores = self.proj_l(scores.movedim(1, -1)).softmax(dim=-2)
        weights = self.attn_drop(self.proj_w(scores).movedim(-1, 1))
        return self.project((weights @ v).transpose(1, 2).flatten(2))


class SlimClass(SlimAttention):
    """Attention of the first token to all; `parts` are the linears of q, k and v."""

    parts: ClassVar[tuple[str, ...]]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, 1, D)."""
        q, k, v = (self.get_submodule(name) for name in self.parts)
        return self.project(self.attend(self.by_head(q(x[:, :1])), self.by_head(k(x)), self.by_head(v(x))))


class SlimClassCait(SlimClass, ClassAttn):
    """CaiT's and XCiT's."""

    parts = ("q", "k", "v")


class SlimCross(SlimClass, CrossAttention):
    """CrossViT's, between its two sizes of patches."""

    parts = ("wq", "wk", "wv")


class SlimClassVolo(SlimAttention, ClassAttention):
    """VOLO's class attention, whose keys and values come from one linear."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, 1, D)."""
        k, v = split_pair(self, self.kv(x))
        return self.project(self.attend(self.by_head(self.q(x[:, :1])), k, v))


def split_pair(slim: SlimAttention, kv: Tensor) -> list[Tensor]:
    """(B, N, h * (query_dim + value_dim)) to k and v, each (B, h, N, d)."""
    widths = [slim.num_heads * slim.query_dim, slim.num_heads * slim.value_dim]
    return [slim.by_head(part) for part in kv.split(widths, dim=-1)]


class SlimGrid(SlimAttention, VoloAttention):
    """VOLO's attention over a grid of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, H, W, D)."""
        attended = self.attend(*self.split(self.qkv(x.flatten(1, 2))))
        return self.project(attended).unflatten(1, x.shape[1:3])


class SlimNest(SlimAttention, NestAttention):
    """NesT's attention inside blocks of the image, which hands its channels on with the heads innermost."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention inside each block over (B, blocks, N, D)."""
        attended = self.attend(*self.split(self.qkv(x.flatten(0, 1))))
        turned = attended.unflatten(-1, (self.num_heads, -1)).transpose(-2, -1).flatten(-2)
        return self.project(turned).unflatten(0, x.shape[:2])


class SlimDavit(SlimAttention, DavitAttention):
    """DaViT's attention inside windows; it drops nothing."""

    attn_drop = nn.Dropout(0.0)
    proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention inside each window over (B * windows, N, D)."""
        return self.project(self.attend(*self.split(self.qkv(x))))


class SlimGlobal(SlimAttention, WindowAttentionGlobal):
    """GC ViT's attention inside windows, whose q may be made for the whole image elsewhere."""

    def narrow_(self, heads: Sequence[int], query: Sequence[Sequence[int]], value_dim: int) -> None:
        """The positions are told how many heads there are."""
        super().narrow_(heads, query, value_dim)
        tell_positions_(self.rel_pos, len(heads))

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Attention inside each window over (B * windows, N, D), `q_global` (B, N, D) or (B, height, width, D)."""
        if q_global is None or not self.use_global:
            q, k, v = self.split(self.qkv(x))
        else:
            k, v = split_pair(self, self.qkv(x))
            by_token = q_global.flatten(1, -2).unflatten(-1, (-1, self.query_dim))
            q: Any = self.of_kept_heads(by_token.transpose(1, 2))
            q = q.repeat_interleave(len(x) // len(q), dim=0)
        return self.project(self.attend_in_windows(q * self.scale, k, v, self.rel_pos.get_bias()[0], None))


class SlimTnt(SlimAttention, TntAttention):
    """TNT's attention, among pixels and among patches."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        q, k = self.qk(x).chunk(2, dim=-1)
        return self.project(self.attend(self.by_head(q), self.by_head(k), self.by_head(self.v(x))))


class SlimConvit(SlimAttention, MHSA):
    """ConViT's plain attention."""

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        return self.project(self.attend(*self.split(self.qkv(x))))


class SlimGated(SlimAttention, GPSA):
    """ConViT's attention that blends in positions."""

    qk: nn.Linear
    v: nn.Linear
    pos_proj: nn.Linear
    rel_indices: Tensor
    gating_param: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, N, D)."""
        if self.rel_indices.shape[1] != x.shape[1]:
            make: Any = self.get_rel_indices
            self.rel_indices = make(x.shape[1])
        q, k = (self.by_head(part) for part in self.qk(x).chunk(2, dim=-1))
        seen = ((self.gated(q) * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        near = self.pos_proj(self.rel_indices).movedim(-1, 1).softmax(dim=-1)
        share = self.gating_param.sigmoid()[:, None, None]
        weights = (1 - share) * seen + share * near
        weights = self.attn_drop(weights / weights.sum(dim=-1, keepdim=True))
        return self.project((weights @ self.by_head(self.v(x))).transpose(1, 2).flatten(2))


class SlimHieraDet(SlimAttention, MultiScaleAttention):
    """The attention of SAM 2's Hiera, whose q may be pooled."""

    attn_drop = nn.Dropout(0.0)
    proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over (B, H, W, D) to (B, pooled H, pooled W, D)."""
        q, k, v = self.split(self.qkv(x.flatten(1, 2)))
        sides = x.shape[1:3]
        if self.q_pool is not None:
            pooled = self.q_pool(q.transpose(-2, -1).flatten(1, 2).unflatten(-1, sides))
            sides = pooled.shape[-2:]
            q = pooled.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-2, -1)
        return self.project(self.attend(q, k, v)).unflatten(1, sides)


class SlimPool(SlimAttention, AttentionPoolLatent):
    """Pooling by the attention of a learned token: SigLIP's head."""

    attn_drop = nn.Dropout(0.0)
    pos_embed: Tensor | None
    q: nn.Module
    kv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    mlp: nn.Module | None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, D)."""
        x = x if self.pos_embed is None else x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q_norm(self.by_head(self.q(self.latent.expand(len(x), -1, -1))))
        k, v = split_pair(self, self.kv(x))
        x = self.project(self.attend(q, self.k_norm(k), v, attn_mask))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


def _but(*refused: Axis) -> Callable[[Any], tuple[Axis, ...]]:
    """All axes without these."""
    every: tuple[Axis, ...] = (*PER_HEAD, "heads")
    return lambda attention: tuple(axis for axis in every if axis not in refused)


def _sam(site: str, module: nn.Module) -> tuple[Group, ...]:
    """SAM's tables of positions are read by q and shared by all heads; rotary positions have no rule yet."""
    attention: Any = module
    rule = attention_rule(only=_but("attn_query", "heads") if attention.use_rel_pos else _but())
    return rule(site, module) if attention.rope is None else ()


def _global(site: str, module: nn.Module) -> tuple[Group, ...]:
    """GC ViT's q is made for the whole image, and used by several blocks."""
    attention: Any = module
    if attention.use_global:
        return attention_rule("", "qkv:0", "qkv:1", per_head=POSITIONS, only=_but("attn_query"))(site, module)
    return attention_rule(per_head=POSITIONS)(site, module)


def _pool(site: str, module: nn.Module) -> tuple[Group, ...]:
    """A learned token that is q itself has the channels of all heads."""
    attention: Any = module
    only = _but() if isinstance(attention.q, nn.Linear) else _but("attn_query", "heads")
    return attention_rule("q", "kv:0", "kv:1", norm="", only=only)(site, module)


POSITIONS: Final = (Slot("rel_pos.relative_position_bias_table", 1), Slot("rel_pos.mlp.fc2", 0))

SLIM_RELATIVES: Final[dict[type, type[SlimAttention]]] = {
    AttentionPoolLatent: SlimPool,
    BeitAttention: SlimBeit,
    ClassAttention: SlimClassVolo,
    ClassAttn: SlimClassCait,
    CrossAttention: SlimCross,
    DavitAttention: SlimDavit,
    GPSA: SlimGated,
    MHSA: SlimConvit,
    MultiScaleAttention: SlimHieraDet,
    NestAttention: SlimNest,
    RelPosAttention: SlimRelPos,
    SamAttention: SlimSam,
    TalkingHeadAttn: SlimTalking,
    TntAttention: SlimTnt,
    VoloAttention: SlimGrid,
    WindowAttentionGlobal: SlimGlobal,
    WindowMultiHeadAttention: SlimWindowCr,
}
RELATIVES: Final[dict[type, Rule]] = {
    AttentionPoolLatent: _pool,
    BeitAttention: attention_rule(per_head=(Slot("relative_position_bias_table", 1),)),
    ClassAttention: attention_rule("q", "kv:0", "kv:1"),
    ClassAttn: attention_rule("q", "k", "v"),
    CrossAttention: attention_rule("wq", "wk", "wv"),
    DavitAttention: attention_rule(),
    GPSA: attention_rule("qk:0", "qk:1", "v", per_head=(Slot("gating_param", 0), Slot("pos_proj", 0))),
    MHSA: attention_rule(),
    MultiScaleAttention: attention_rule(basis="fixed"),  # pooling takes the largest of each channel
    NestAttention: attention_rule(only=_but("attn_value", "heads")),  # whose proj reads the heads innermost
    RelPosAttention: attention_rule(per_head=POSITIONS),
    SamAttention: _sam,
    TalkingHeadAttn: attention_rule(only=_but("heads")),  # which are mixed
    TntAttention: attention_rule("qk:0", "qk:1", "v"),
    VoloAttention: attention_rule(),
    WindowAttentionGlobal: _global,
    WindowMultiHeadAttention: attention_rule(
        per_head=(Slot("logit_scale", 0), Slot("meta_mlp.fc2", 0)), basis="orthogonal"
    ),
}
