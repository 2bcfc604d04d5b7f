"""Networks that timm registers, without weights; each is built once."""

from functools import cache
from typing import Any

import timm
from torch import nn

from kcrprune.containers.contents import Shape, shapes_of
from kcrprune.families import outlining


@cache
def outline(name: str, **arguments: Any) -> nn.Module:
    """A registered network on the meta device."""
    with outlining():
        return timm.create_model(name, **arguments).eval()


@cache
def shapes(name: str, **arguments: Any) -> dict[str, Shape]:
    """Of its tensors."""
    return shapes_of(outline(name, **arguments).state_dict())
