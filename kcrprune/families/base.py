"""The contract of a family: which networks it covers, and where their blocks can be cut.

Letters: N tokens of one image, T tokens of one attention window, D width of the residual stream, H hidden units,
h heads, d channels of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kcrprune.plan import Axis


@dataclass(frozen=True)
class BlockSite:
    """One transformer block: the names of its parts and the sizes that decide its cost."""

    name: str  # dotted name of the block
    width: int  # D
    hidden: int  # H
    heads: int  # h
    head_dim: int  # d
    tokens: int  # N that pass the MLP
    attn_tokens: int  # tokens that pass attention, window padding included
    window_tokens: int  # T
    axes: tuple[Axis, ...]  # what may be cut here
    rotate_query: bool = True  # an invertible change of basis of q and k leaves the block unchanged
    rotate_value: bool = True  # likewise v and proj
    entry: tuple[str, ...] = ()  # modules between the previous block and this one
    norm1: str = "norm1"
    attn: str = "attn"
    norm2: str = "norm2"
    mlp: str = "mlp"
    scale1: str | None = None  # LayerScale behind attention
    scale2: str | None = None  # LayerScale behind the MLP

    @property
    def qkv(self) -> str:
        """Dotted name of the linear that makes q, k and v."""
        return f"{self.name}.{self.attn}.qkv"

    @property
    def proj(self) -> str:
        """Dotted name of the linear behind attention."""
        return f"{self.name}.{self.attn}.proj"

    @property
    def fc1(self) -> str:
        """Dotted name of the MLP's first linear."""
        return f"{self.name}.{self.mlp}.fc1"

    @property
    def fc2(self) -> str:
        """Dotted name of the MLP's second linear."""
        return f"{self.name}.{self.mlp}.fc2"


@dataclass(frozen=True)
class AttentionWidths:
    """What a pruned attention keeps: dense head indices, and channels of q/k and of v in each head."""

    heads: tuple[int, ...]
    query_dim: int
    value_dim: int


@dataclass(frozen=True)
class Family:
    """A kind of network.

    `refusal(model)` is None for a network that the family can cut, else the reason in one sentence;
    `sites(model)` lists its blocks in the order of the forward pass; `prune_attention(attention, widths)` is a new
    attention of those widths around the (already cut) linears and the other parts of the given one.
    """

    name: str
    model_class: type[nn.Module]
    refusal: Callable[[nn.Module], str | None]
    sites: Callable[[nn.Module], tuple[BlockSite, ...]]
    prune_attention: Callable[[nn.Module, AttentionWidths], nn.Module]
