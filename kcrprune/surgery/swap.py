"""Replaces one named module of a model by another."""

from torch import nn


def swap_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the module `name`; training mode is carried over."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    setattr(parent, child, new.train(old.training))
