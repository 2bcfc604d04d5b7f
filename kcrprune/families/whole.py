"""What attention is, by the names of its classes, and which of it stays whole for which reason."""

import re
from typing import Final

from torch import nn

from kcrprune.families.contract import Group

# a module in which tokens look at each other
ATTENTION: Final = re.compile(r"Attention|Attn|MHSA|SHSA|SHMA|XCA|GPSA|LiteMLA|ParallelScalingBlock")
# these weigh channels or places of a convolutional network, or hold an attention of another class
OTHERS: Final = re.compile(
    r"(Split|SelectiveKernel|BatNonLocal|.*(Block|Pool))Attn|.*Block(ClassAttn)?|BilinearAttn\w*"
)

CHANNELS: Final = "its attention runs over channels, which k and v index on both sides"
REASONS: Final = {
    "ChannelAttentionV2": CHANNELS,
    "FactorAttnConvRelPosEnc": "it multiplies k with v first, and a convolution whose kernel differs by head reads v",
    "CascadedGroupAttention": "each head reads what the one before has made",
    "LiteMLA": "a convolution of several groups mixes the channels of each head",
    "MultiQueryAttention2d": "its heads share k and v; no rule yet",
    "EfficientAdditiveAttention": "its queries are pooled by a vector that they share",
    "DiffAttention": "two halves of a head share a norm and are subtracted; no rule yet",
    "DiffParallelScalingBlock": "one linear makes the channels of two branches; no rule yet",
    "ParallelScalingBlock": "one linear makes the channels of two branches; no rule yet",
    "OutlookAttention": "its weights are made by a linear of their own, for each neighbour; no rule yet",
    "Gemma4Attention": "q, k and v are normed inside each head; no rule yet",
    "AttentionPool2d": "its positions and its linears are used inside one call of torch",
}
NO_RULE: Final = "no rule yet"


def attentions_in(model: nn.Module) -> dict[str, list[str]]:
    """The modules of attention in a network, by the name of their class; what is around another one is none."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    there = [name for name, kind in kinds.items() if _is_attention(kind)]
    around = {name[:end] for name in there for end, sign in enumerate(name) if sign == "."}
    found: dict[str, list[str]] = {}
    for name in there:
        if name not in around:
            found.setdefault(kinds[name], []).append(name)
    return found


def _is_attention(kind: str) -> bool:
    return bool(ATTENTION.search(kind)) and (kind in REASONS or not OTHERS.fullmatch(kind))


def left_whole(model: nn.Module, groups: tuple[Group, ...]) -> dict[str, str]:
    """The classes of attention in a network of which one has no group, with the reason."""
    sites = {group.site for group in groups}
    return {
        kind: REASONS.get(kind, NO_RULE)
        for kind, names in attentions_in(model).items()
        if not all(name in sites for name in names)
    }
