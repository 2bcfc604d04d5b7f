"""What is left of a branch that goes as a whole: a constant, which it adds to its stream."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from kcrprune.families import Group
from kcrprune.families.linears import Linear
from kcrprune.surgery.swap import linear_at, swap_


class Constant(nn.Module):
    """In the place of a branch: the bias of its last linear, for every token.

    That linear stays under its name, without any inputs, so that tensors keep their names.
    """

    def __init__(self, name: str, linear: Linear) -> None:
        super().__init__()
        self.add_module(name, linear)
        self.name = name

    @classmethod
    def of(cls, model: nn.Module, group: Group) -> Self:
        """What the branch of a group leaves; it shares the linear."""
        assert group.constant is not None
        return cls(group.constant.removeprefix(f"{group.site}."), linear_at(model, group.constant))

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """The constant in the shape of x, (..., C), or (B, C, H, W) where the linear is a convolution; a view."""
        linear = linear_at(self, self.name)
        assert linear.bias is not None
        bias = linear.bias if torch.is_grad_enabled() else linear.bias.detach()  # a view keeps asking for gradients
        if isinstance(linear, nn.Conv2d):
            return bias[:, None, None].expand(x.shape[0], -1, *x.shape[2:])
        return bias.expand(*x.shape[:-1], -1)


def leave_constant_(model: nn.Module, group: Group) -> None:
    """Puts its constant in the place of the branch of a group, whose last linear has lost its inputs.

    The norm that only the branch reads goes with it.
    """
    swap_(model, group.site, Constant.of(model, group))
    if group.stream not in (None, group.site):
        swap_(model, str(group.stream), nn.Identity())
