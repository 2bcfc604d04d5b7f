"""The one attention of blocks that are gated or cut: widths of its own, a gate on q and k, one place where heads meet.

Each attention class of a family adds how q, k and v are made and what biases the scores (see attentions); its children,
parameters and state-dict keys are those of the dense attention.

Letters: N tokens, h heads, d channels of a head.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EIGHT: Final = 8  # channels, 16 bytes in half precision: what a GPU's kernels load at once


class SlimAttention(nn.Module):
    """What a slim attention adds to its dense class; made from a dense one by `of`, never by its own constructor."""

    pad: ClassVar[bool] = True  # bring q, k and v to one width for the kernel; see `kept_widths`

    num_heads: int
    scale: float  # the dense softmax's, whatever is cut
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Module
    query_dim: int
    value_dim: int
    kept_heads: Tensor | None  # (h,) of the dense ones; None: all
    channels: Tensor | None  # (h, query_dim) the dense channels of q and k; None: all
    query_gate: Callable[[], Tensor] | None  # (h * query_dim,), or one for each image in a first dimension

    @classmethod
    def of(cls, dense: nn.Module) -> Self:
        """A slim attention that shares the parts of a dense one and computes the same."""
        slim: Any = copy.copy(dense)
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            slim.__dict__[shared] = copy.copy(dense.__dict__[shared])
        slim.__class__ = cls
        slim.query_dim, slim.value_dim = slim.dense_widths()
        slim.query_gate = None
        for name in ("kept_heads", "channels"):
            slim.register_buffer(name, None, persistent=False)
        return slim

    def dense_widths(self) -> tuple[int, int]:
        """Channels of a head, of q and k and of v, before any cut."""
        width = self.proj.in_features // self.num_heads
        return width, width

    def narrow_(self, heads: Sequence[int], query: Sequence[Sequence[int]], value_dim: int) -> None:
        """Takes note of what was kept: the channels of q and k of each head, and how many of v."""
        self.num_heads, self.query_dim, self.value_dim = len(heads), len(query[0]), value_dim
        device = next(self.parameters()).device
        self.kept_heads, self.channels = torch.tensor(heads, device=device), torch.tensor(query, device=device)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, N, h * d) to (B, h, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """(B, N, h * (2 query_dim + value_dim)) to q, k and v, each (B, h, N, d)."""
        query, value = self.num_heads * self.query_dim, self.num_heads * self.value_dim
        return [self.by_head(part) for part in qkv.split([query, query, value], dim=-1)]

    def opened(self) -> Tensor | None:
        """The gate of q and k as (h, 1, query_dim), or (images, h, 1, query_dim); None: open."""
        return None if self.query_gate is None else self.query_gate().unflatten(-1, (self.num_heads, -1)).unsqueeze(-2)

    def gated(self, x: Tensor) -> Tensor:
        """The product of x (B, h, N, query_dim) and the gate of q and k; an image's windows lie in adjacent rows."""
        gate = self.opened()
        if gate is None:
            return x
        if gate.ndim == 4:
            gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
        return x * gate.to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **causal: Any) -> Tensor:
        """Softmax attention over (B, h, N, d) as (B, N, h * value_dim), with the dense scale."""
        q = self.gated(q)
        dropout = self.attn_drop.p if self.training else 0.0
        if self._pads():
            q, k, v = _padded(q, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale, **causal)
        return x[..., : self.value_dim].transpose(1, 2).flatten(2)

    def _pads(self) -> bool:
        """Not where a graph is made, whose runtime chooses for itself."""
        return self.pad and not (torch.jit.is_tracing() or torch.compiler.is_exporting())  # type: ignore[attr-defined]

    def attend_in_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside windows (B * windows, h, N, d) with bias (h, N, N) and mask (windows, N, N)."""
        q = self.gated(q)
        scores = q @ k.transpose(-2, -1) + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        x = self.attn_drop(scores.softmax(dim=-1)) @ v
        return x.transpose(1, 2).flatten(2)

    def weighed(self, x: Tensor, attended: Tensor) -> Tensor:
        """What attention made (B, N, h * value_dim), times what its gate makes of x where it has one."""
        gate = getattr(self, "gate", None)
        return attended if gate is None else attended * gate(x).sigmoid()

    def of_kept_heads(self, x: Tensor | None) -> Tensor | None:
        """Of something that is made for all dense heads (..., h, N, d), that of the kept ones."""
        return x if x is None or self.kept_heads is None else x.index_select(-3, self.kept_heads)

    def project(self, x: Tensor) -> Tensor:
        """The branch's output from (B, N, h * value_dim)."""
        return self.proj_drop(self.proj(x))


def _padded(*parts: Tensor) -> list[Tensor]:
    """q, k and v with zeros at the widths that the kernel is fast at."""
    widths = kernel_widths([part.shape[-1] for part in parts], parts[0].device.type)
    return [
        F.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part
        for part, width in zip(parts, widths, strict=True)
    ]


def kernel_widths(widths: Sequence[int], device: str) -> list[int]:
    """The widths at which attention is fast on a kind of device.

    A CPU's flash kernel takes one for q, k and v. A GPU's take two, and load multiples of 8: on an H100 one width for
    both took up to twice as long (docs/benchmarks.md).
    """
    if device == "cuda":
        return [-(-width // EIGHT) * EIGHT for width in widths]
    return [max(widths)] * len(widths)


@contextmanager
def kept_widths() -> Iterator[None]:
    """Attention computes on the widths that were kept, as it does by itself in traces and exports: no padding."""
    before = SlimAttention.pad
    SlimAttention.pad = False
    try:
        yield
    finally:
        SlimAttention.pad = before
