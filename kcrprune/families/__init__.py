"""Which networks kcrprune knows, and where to cut them."""

from typing import Any, Final, cast

import timm
import torch
from torch import nn

from kcrprune.errors import UnsupportedModelError
from kcrprune.families.base import AttentionWidths, BlockSite, Family
from kcrprune.families.features import FeatureTap, classifiers
from kcrprune.families.swin import SWIN
from kcrprune.families.vit import VIT
from kcrprune.plan import Architecture

FAMILIES: Final[tuple[Family, ...]] = (VIT, SWIN)


def family_of(model: nn.Module) -> Family:
    """The family that covers `model`; UnsupportedModelError with the reason where none does."""
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            reason = family.refusal(model)
            if reason is None:
                return family
            raise UnsupportedModelError(f"this network cannot be cut: {reason}")
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a network that kcrprune can cut; it knows timm's {known}"
    )


def sites(model: nn.Module) -> tuple[BlockSite, ...]:
    """The blocks of a dense model, from the input to the head."""
    return family_of(model).sites(model)


def build(architecture: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
    """The dense network of an architecture with fresh weights, in eval mode."""
    arguments = cast(dict[str, Any], dict(architecture.arguments))
    with torch.device(device):
        model = timm.create_model(architecture.name, pretrained=False, **arguments)
    if architecture.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = architecture.norm_eps
    return model.eval()


__all__ = [
    "FAMILIES",
    "AttentionWidths",
    "BlockSite",
    "Family",
    "FeatureTap",
    "build",
    "classifiers",
    "family_of",
    "sites",
]
