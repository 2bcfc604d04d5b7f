"""Which networks kcrprune knows, and where their channels lie."""

from collections.abc import Sequence
from typing import Any, Final

import timm
import torch
from torch import Tensor, nn

from kcrprune.errors import UnsupportedModelError
from kcrprune.families.attentions import ATTENTIONS, SLIM_ATTENTIONS
from kcrprune.families.blocks import BLOCKS as LINEAR_BLOCKS
from kcrprune.families.channels import CHANNELS, SLIM_CHANNELS
from kcrprune.families.contract import Branch, Contract, Group, Key, Rule, Slot, Stream, find_groups, owner_of
from kcrprune.families.convolutions import CONVOLUTIONAL_BLOCKS, CONVOLUTIONS, forget_caches_
from kcrprune.families.features import FeatureTap, classifiers, outputs_of
from kcrprune.families.foreign import FOREIGN, FOREIGN_BLOCKS
from kcrprune.families.given import Feed, Given
from kcrprune.families.hybrids import HYBRIDS, SLIM_HYBRIDS
from kcrprune.families.mlps import MLPS
from kcrprune.families.observed import observe
from kcrprune.families.outline import outlining
from kcrprune.families.relatives import RELATIVES, SLIM_RELATIVES
from kcrprune.families.slim import SlimAttention, kept_widths
from kcrprune.families.streams import find_streams
from kcrprune.plan import Architecture

RULES: Final[dict[type | str, Rule]] = {
    **MLPS,
    **ATTENTIONS,
    **RELATIVES,
    **CHANNELS,
    **HYBRIDS,
    **CONVOLUTIONS,
    **FOREIGN,
}
BLOCKS: Final[dict[type | str, dict[str, Branch]]] = {**LINEAR_BLOCKS, **CONVOLUTIONAL_BLOCKS, **FOREIGN_BLOCKS}
SLIM: Final[dict[type, type[SlimAttention]]] = SLIM_ATTENTIONS | SLIM_RELATIVES | SLIM_CHANNELS | SLIM_HYBRIDS
FAMILIES: Final = {  # the names that some families had before a family was a module of timm
    "vision_transformer": "vit",
    "deit": "vit",
    "swin_transformer": "swin",
    "swin_transformer_v2": "swinv2",
}


def family_of(model: nn.Module) -> str:
    """What the kind of a network is called; UnsupportedModelError with the reason where nothing of it can be cut."""
    if not groups_of(model):
        parts = sorted({type(module).__name__ for module in model.modules() if type(module).__name__[0] != "_"})
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no part that kcrprune can cut; it is made of {', '.join(parts)}"
        )
    module = type(model).__module__.rpartition(".")[2]
    return FAMILIES.get(module, module)


def groups_of(model: nn.Module) -> tuple[Group, ...]:
    """Every group of a dense network, in the order of its modules; by the exact class of each branch module."""
    if isinstance(model, Given):
        return model.groups
    return find_groups(model, RULES, BLOCKS)


def streams_of(model: nn.Module, groups: Sequence[Group] | None = None) -> tuple[Stream, ...]:
    """The residual streams of a dense network, from the input on, where all that touches them is known."""
    return find_streams(model, groups_of(model) if groups is None else groups)


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
    attentions = {group.site: group.heads * group.width for group in groups if group.axis == "attn_query"}
    training = model.training
    positions, pairs = observe(model.eval(), named, attentions, image)
    model.train(training)
    rank = {name: index for index, name in enumerate(positions)}
    first = {
        site: min((rank[name] for name in positions if name.startswith(f"{site}.")), default=len(rank))
        for site in {group.site for group in groups}
    }
    ordered = tuple(sorted(groups, key=lambda group: first[group.site]))
    return Contract(ordered, positions, pairs, streams_of(model, groups))


def _of_timm(value: Any) -> Any:
    """An argument as timm writes it: with tuples where JSON has lists."""
    return tuple(map(_of_timm, value)) if isinstance(value, list) else value


def build(architecture: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
    """The dense network of an architecture with fresh weights, in eval mode."""
    arguments = {name: _of_timm(value) for name, value in architecture.arguments.items()}
    with outlining() if torch.device(device).type == "meta" else torch.device(device):
        model = timm.create_model(architecture.name, pretrained=False, **arguments)
    if architecture.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = architecture.norm_eps
    return forget_caches_(model).eval()


__all__ = [
    "BLOCKS",
    "FAMILIES",
    "RULES",
    "SLIM",
    "Contract",
    "FeatureTap",
    "Group",
    "Key",
    "SlimAttention",
    "Slot",
    "Stream",
    "build",
    "classifiers",
    "contract_of",
    "family_of",
    "find_groups",
    "forget_caches_",
    "groups_of",
    "kept_widths",
    "outlining",
    "outputs_of",
    "owner_of",
    "streams_of",
]
