"""Which networks kcrprune knows, and where their channels lie."""

from dataclasses import dataclass
from typing import Any, Final

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from kcrprune.errors import UnsupportedModelError
from kcrprune.families.attentions import ATTENTIONS, SLIM
from kcrprune.families.contract import Branch, Contract, Group, Key, Rule, Slot, find_groups, owner_of
from kcrprune.families.features import FeatureTap, classifiers, outputs_of
from kcrprune.families.foreign import FOREIGN, FOREIGN_BLOCKS
from kcrprune.families.given import Feed, Given
from kcrprune.families.mlps import MLPS
from kcrprune.families.observed import observe
from kcrprune.families.slim import SlimAttention, kept_widths
from kcrprune.plan import Architecture

RULES: Final[dict[type | str, Rule]] = {**MLPS, **ATTENTIONS, **FOREIGN}
BLOCKS: Final[dict[type | str, dict[str, Branch]]] = {  # those that add their branches to the input of a norm
    Block: {"attn": Branch("norm1", "ls1", "norm2"), "mlp": Branch("norm2", "ls2")},
    SwinTransformerBlock: {"attn": Branch("norm1", behind="norm2"), "mlp": Branch("norm2")},
    EvaBlock: {"attn": Branch("norm1", "gamma_1", "norm2"), "mlp": Branch("norm2", "gamma_2")},
    **FOREIGN_BLOCKS,
}


@dataclass(frozen=True)
class Family:
    """A kind of network whose checkpoints are opened by name: timm's classes, exactly."""

    name: str
    model_classes: tuple[type[nn.Module], ...]


FAMILIES: Final = (
    Family("vit", (VisionTransformer, VisionTransformerDistilled)),
    Family("swin", (SwinTransformer,)),
    Family("swinv2", (SwinTransformerV2,)),
    Family("eva", (Eva,)),
)


def family_of(model: nn.Module) -> Family:
    """The family of a network; UnsupportedModelError with the reason where there is none."""
    for family in FAMILIES:
        if type(model) in family.model_classes:
            if groups_of(model):
                return family
            parts = sorted({type(module).__name__ for module in model.modules() if type(module).__name__[0] != "_"})
            raise UnsupportedModelError(
                f"this {type(model).__name__} has no part that kcrprune can cut; it is made of {', '.join(parts)}"
            )
    known = ", ".join(cls.__name__ for family in FAMILIES for cls in family.model_classes)
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a network that kcrprune can cut; it knows timm's {known}"
    )


def groups_of(model: nn.Module) -> tuple[Group, ...]:
    """Every group of a dense network, in the order of its modules; by the exact class of each branch module."""
    if isinstance(model, Given):
        return model.groups
    return find_groups(model, RULES, BLOCKS)


def contract_of(model: nn.Module, image: Tensor | Feed | tuple[int, int, int]) -> Contract:
    """The groups of a dense network and what one image (1, C, H, W), or of that size (C, H, W), meets there.

    Of a network in memory: what a batch meets.
    """
    groups = groups_of(model)
    if isinstance(image, tuple):
        weight = next(model.parameters())
        image = torch.zeros(1, *image, device=weight.device, dtype=weight.dtype)
    owners = dict.fromkeys(slot.owner for group in groups for slot in (*group.writers, *group.readers, *group.per_head))
    named = [name for name in owners if isinstance(owner_of(model, name), nn.Module)]
    attentions = list(dict.fromkeys(group.site for group in groups if group.axis == "attn_value"))
    training = model.training
    positions, pairs = observe(model.eval(), named, attentions, image)
    model.train(training)
    rank = {name: index for index, name in enumerate(positions)}
    first = {
        site: min((rank[name] for name in positions if name.startswith(f"{site}.")), default=len(rank))
        for site in {group.site for group in groups}
    }
    return Contract(tuple(sorted(groups, key=lambda group: first[group.site])), positions, pairs)


def _of_timm(value: Any) -> Any:
    """An argument as timm writes it: with tuples where JSON has lists."""
    return tuple(map(_of_timm, value)) if isinstance(value, list) else value


def build(architecture: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
    """The dense network of an architecture with fresh weights, in eval mode."""
    arguments = {name: _of_timm(value) for name, value in architecture.arguments.items()}
    with torch.device(device):
        model = timm.create_model(architecture.name, pretrained=False, **arguments)
    if architecture.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = architecture.norm_eps
    return model.eval()


__all__ = [
    "BLOCKS",
    "FAMILIES",
    "RULES",
    "SLIM",
    "Contract",
    "Family",
    "FeatureTap",
    "Group",
    "Key",
    "SlimAttention",
    "Slot",
    "build",
    "classifiers",
    "contract_of",
    "family_of",
    "find_groups",
    "groups_of",
    "kept_widths",
    "outputs_of",
    "owner_of",
]
