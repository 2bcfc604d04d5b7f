"""Attentions that run over channels: d by d scores in each head, from products over the tokens.

The channels of the tensor that makes the rows of the scores come out again, each as one channel that `proj` reads, so
they can be cut. Those of the other two are what the softmax runs over, and stay.
"""

from dataclasses import replace
from typing import Any, Final

import torch.nn.functional as F
from timm.models.davit import ChannelAttention
from timm.models.edgenext import CrossCovarianceAttn
from timm.models.xcit import XCA
from torch import Tensor, nn

from kcrprune.families.attentions import attention_rule
from kcrprune.families.contract import Group, Rule, Slot
from kcrprune.families.slim import SlimAttention


class OverChannels(SlimAttention):
    """The rows of the scores have `value_dim` channels, their columns `query_dim`."""

    rows = 0  # the part of qkv that makes them

    def parts(self, x: Tensor) -> list[Tensor]:
        """q, k and v of (B, N, D), each (B, h, channels, N)."""
        widths = [self.num_heads * (self.value_dim if part == self.rows else self.query_dim) for part in range(3)]
        qkv: Any = self.qkv
        return [self.by_head(part).transpose(-2, -1) for part in qkv(x).split(widths, dim=-1)]

    def weigh(self, scores: Tensor, x: Tensor) -> Tensor:
        """The branch's output from scores (B, h, value_dim, query_dim) and what they weigh, (B, h, query_dim, N)."""
        attended = self.attn_drop(scores.softmax(dim=-1)) @ x
        return self.project(attended.flatten(1, 2).transpose(1, 2))


class SlimCrossCovariance(OverChannels):
    """What XCiT and EdgeNeXt share: q and k of length 1 over the tokens, a temperature for each head."""

    temperature: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the channels of (B, N, D)."""
        q, k, v = self.parts(x)
        return self.weigh(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature, v)


class SlimXca(SlimCrossCovariance, XCA):
    """XCiT's."""


class SlimEdgeNext(SlimCrossCovariance, CrossCovarianceAttn):
    """EdgeNeXt's."""


class SlimDavitChannels(OverChannels, ChannelAttention):
    """DaViT's, whose k makes the rows of the scores and whose q is weighed."""

    rows = 1
    attn_drop = nn.Dropout(0.0)
    proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the channels of (B, N, D)."""
        q, k, v = self.parts(x)
        return self.weigh(k * self.scale @ v.transpose(-2, -1), q)


def _over_channels(rows: str, columns: str, weighed: str, *, per_head: tuple[Slot, ...] = ()) -> Rule:
    rule = attention_rule(columns, weighed, rows, per_head=per_head, only=lambda attention: ("attn_value", "heads"))

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        query, value, heads = rule(site, module)
        return replace(query, products=0), replace(value, basis="fixed", products=2), heads

    return groups


_TEMPERATURE: Final = (Slot("temperature", 0),)
SLIM_CHANNELS: Final[dict[type, type[SlimAttention]]] = {
    ChannelAttention: SlimDavitChannels,
    CrossCovarianceAttn: SlimEdgeNext,
    XCA: SlimXca,
}
CHANNELS: Final[dict[type, Rule]] = {
    ChannelAttention: _over_channels("qkv:1", "qkv:2", "qkv:0"),
    CrossCovarianceAttn: _over_channels("qkv:0", "qkv:1", "qkv:2", per_head=_TEMPERATURE),
    XCA: _over_channels("qkv:0", "qkv:1", "qkv:2", per_head=_TEMPERATURE),
}
