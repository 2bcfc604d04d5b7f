"""Finds and replaces one named module of a model."""

from torch import nn

from kcrprune.families.linears import Linear, is_linear


def swap_(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Puts `new` in the place of the module `name`, which is returned; training mode is carried over."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    new.train(old.training)  # some of timm's return nothing here
    setattr(parent, child, new)
    return old


def linear_at(model: nn.Module, name: str) -> Linear:
    """The linear or 1x1 convolution of that name."""
    linear = model.get_submodule(name)
    assert is_linear(linear), name
    return linear
