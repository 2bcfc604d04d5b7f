"""Where the channels of the residual stream lie, in networks of which each tensor is known to touch it or not.

This is the one thing that knows the stream. Its channels may stand in any order, as long as all that writes or reads
them agrees; then blocks whose MLPs keep nested sets of them keep the first ones each. A network with a tensor that is
not in these tables has no streams here, and the paper's axis is cut by gathers there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kcrprune.families.contract import Group, Slot, Stream, owner_of
from kcrprune.families.features import classifiers

Dims = Mapping[str, int]  # of owners, whose numbers are left out: the dimension that holds the stream's channels


@dataclass(frozen=True)
class Touching:
    """What touches the stream: of the stage that it lies in, and of the one before; and what touches none."""

    own: Dims
    before: Dims = field(default_factory=dict)
    apart: Sequence[str] = ()  # names, with `*` as in a shell


_BLOCK: Final[Dims] = {"norm1": 0, "attn.qkv": 1, "attn.gate": 1, "attn.proj": 0, "ls1": 0, "norm2": 0, "ls2": 0}
_INSIDE: Final = ("attn.q_norm", "attn.k_norm", "attn.norm")


def _below(name: str) -> Dims:
    return {f"{name}.{owner}": dim for owner, dim in _BLOCK.items()}


_PATCHES: Final[Dims] = {"patch_embed.proj": 0, "patch_embed.norm": 0}
_TOKENS: Final[Dims] = {"cls_token": 2, "reg_token": 2, "dist_token": 2, "pos_embed": 2}
_HEADS: Final[Dims] = {"norm_pre": 0, "norm": 0, "fc_norm": 0, "head": 1, "head_dist": 1, "head.fc": 1}
_VIT: Final = Touching(
    {**_PATCHES, **_TOKENS, **_HEADS, **_below("blocks")},
    apart=("patch_embed.backbone.*", *(f"blocks.{name}" for name in _INSIDE)),
)
_SWIN: Final = Touching(
    {**_PATCHES, **_HEADS, **_below("layers.blocks"), "layers.downsample.reduction": 0},
    before={"layers.downsample.norm": 0, "layers.downsample.reduction": 1},
    apart=("layers.blocks.attn",),  # its table of positions
)
STREAMS: Final[dict[type, Touching]] = {
    VisionTransformer: _VIT,
    VisionTransformerDistilled: _VIT,
    SwinTransformer: _SWIN,
}


def find_streams(model: nn.Module, groups: Sequence[Group]) -> tuple[Stream, ...]:
    """The streams of a dense network with these groups, one a stage, from the input on; none where one is not known.

    A network without a classifier gives its stream away, whose order then belongs to whoever takes it.
    """
    touching, wide = STREAMS.get(type(model)), [group for group in groups if group.wide]
    if touching is None or not wide or not classifiers(model):
        return ()
    widths = {_stage(group.site, 0): group.width for group in wide}
    slots: dict[int, list[Slot]] = {stage: [] for stage in widths}
    for group in wide:
        slots[_stage(group.site, 0)] += (*group.writers, *group.readers)
    sites = tuple(f"{group.site}." for group in wide)
    for owner in _owners(model):
        held = [] if owner.startswith(sites) else _held(model, owner, touching, widths)
        if held is None:
            return ()
        for stage, slot in held:
            slots[stage].append(slot)
    return tuple(Stream(widths[stage], tuple(slots[stage])) for stage in sorted(widths))


def _held(model: nn.Module, owner: str, touching: Touching, widths: Mapping[int, int]) -> list[tuple[int, Slot]] | None:
    """Where an owner holds channels of which stages' streams; None where that is not known.

    It holds them several times where patches are merged, or two ways of pooling go on.
    """
    name, stage = _unnumbered(owner), _stage(owner, max(widths))
    if any(fnmatchcase(name, pattern) for pattern in touching.apart):
        return []
    found: list[tuple[int, Slot]] = []
    for back, dims in enumerate((touching.own, touching.before)):
        if name in dims:
            size, width = _size(model, owner, dims[name]), widths.get(stage - back, 0)
            if width == 0 or size % width != 0:
                return None
            found += ((stage - back, Slot(owner, dims[name], start)) for start in range(0, size, width))
    return found or None


def _owners(model: nn.Module) -> list[str]:
    """Every module that holds a parameter, and every parameter that the network itself holds."""
    names = [name for name, _ in model.named_parameters()]
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def _unnumbered(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _stage(name: str, last: int) -> int:
    """The stage that something lies in: a ViT has one."""
    first, second, *_ = (*name.split("."), "")
    if first == "layers":
        return int(second)
    return 0 if first == "patch_embed" else last


def _size(model: nn.Module, owner: str, dim: int) -> int:
    found = owner_of(model, owner)
    tensor = found if isinstance(found, Tensor) else next(found.parameters(recurse=False))
    return tensor.shape[dim]
