"""Finds and replaces one named module of a model."""

from torch import nn


def swap_(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Puts `new` in the place of the module `name`, which is returned; training mode is carried over."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    setattr(parent, child, new.train(old.training))
    return old


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear of that name."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    return linear
