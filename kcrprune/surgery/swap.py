"""Finds and replaces one named module of a model."""

from torch import Tensor, nn


def swap_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the module `name`; training mode is carried over."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    setattr(parent, child, new.train(old.training))


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear of that name."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    return linear


def layer_scale_at(model: nn.Module, name: str) -> Tensor:
    """The factors (D,) of the LayerScale of that name."""
    gamma = model.get_submodule(name).gamma
    assert isinstance(gamma, Tensor), name
    return gamma
