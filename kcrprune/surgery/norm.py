"""A norm over the channels of a group while some of them are closed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class GatedNorm(nn.Module):
    """A layer norm or RMS norm whose statistics are weighted by a gate, mean = sum(g x) / sum(g).

    Open gates give the dense norm, gates of 0 and 1 the norm of the width that a cut leaves. `gate()` is (C,), or
    (B, C) for an input whose first dimension holds B images' rows side by side.
    """

    open: Tensor | None

    def __init__(self, norm: nn.Module, gate: Callable[[], Tensor] | None = None, open: Tensor | None = None) -> None:
        super().__init__()
        dense: Any = norm
        self.weight, self.bias, self.eps = dense.weight, getattr(dense, "bias", None), dense.eps
        self.centred = isinstance(norm, nn.LayerNorm)
        self.gate = gate
        self.register_buffer("open", open, persistent=False)  # a gate that stays: a cut network in dense shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        gate = self.open if self.gate is None else self.gate()
        assert gate is not None
        if gate.ndim == 2:
            gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
            gate = gate.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        share = gate / gate.sum(-1, keepdim=True).clamp_min(1e-12)  # all are closed where the branch goes
        if self.centred:
            x = x - (x * share).sum(-1, keepdim=True)
        x = x * ((x.square() * share).sum(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return x if self.bias is None else x + self.bias
