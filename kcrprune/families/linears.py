"""Layers that multiply channels by one matrix: linears, and 1x1 convolutions, which are linears over positions.

Letters: I inputs, O outputs.
"""

from typing import TypeGuard

from torch import Tensor, nn

Linear = nn.Linear | nn.Conv2d


def is_linear(owner: object) -> TypeGuard[Linear]:
    """Whether a module is a linear, or a convolution that is one at each of its positions."""
    if not isinstance(owner, nn.Conv2d):
        return isinstance(owner, nn.Linear)
    return (owner.kernel_size, owner.stride, owner.padding, owner.groups) == ((1, 1), (1, 1), (0, 0), 1)


def matrix(linear: Linear) -> Tensor:
    """Its weight (O, I); a view."""
    return linear.weight.flatten(1)


def channels_last(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear reads or gives as (..., C); a view."""
    return x.movedim(1, -1) if isinstance(linear, nn.Conv2d) else x
