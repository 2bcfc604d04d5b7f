"""Linears that take or give some channels of the residual stream, which stays as wide as it was.

Where the channels are the first ones, as a plan has them that sets the stream's order, a slice and zeros behind do;
anywhere else they are gathered, which gives back most of the time that a cut saves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kcrprune.families.linears import Linear


class _Owning(nn.Linear):
    """Takes over the weight and bias of a linear that has been cut."""

    def __init__(self, linear: Linear) -> None:
        outputs, inputs = linear.weight.shape
        super().__init__(inputs, outputs, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias


class GatherLinear(_Owning):
    """A linear over some channels of its input; `index` (I,) says which."""

    index: Tensor

    def __init__(self, linear: Linear, index: Sequence[int]) -> None:
        super().__init__(linear)
        self.register_buffer("index", torch.tensor(index, device=linear.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., out)."""
        return super().forward(input.index_select(-1, self.index))


class ScatterLinear(_Owning):
    """A linear that writes some channels of its output and zero to the others.

    `index` (D,) names for every output channel the row that writes it, or I for none: the rows are padded by one
    zero channel and gathered, so that an exported graph has a Gather and no Scatter.
    """

    index: Tensor

    def __init__(self, linear: Linear, rows: Sequence[int], width: int) -> None:
        super().__init__(linear)
        index = torch.full((width,), len(rows), device=linear.weight.device)
        index[list(rows)] = torch.arange(len(rows), device=index.device)
        self.register_buffer("index", index)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., D)."""
        rows = super().forward(input)  # (..., I)
        return nn.functional.pad(rows, (0, 1)).index_select(-1, self.index)


class FirstReader(_Owning):
    """A linear over the first channels of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., out)."""
        return super().forward(input[..., : self.in_features])


class FirstWriter(_Owning):
    """A linear that writes the first channels of its output, and zero to the others."""

    def __init__(self, linear: Linear, width: int) -> None:
        super().__init__(linear)
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., D)."""
        return nn.functional.pad(super().forward(input), (0, self.width - self.out_features))
