"""OpenMMLab: ViT and Swin of mmpretrain (before: mmcls), the ViT of mmseg, the Swin of mmdet and mmseg."""

import re
from typing import Final

from torch import Tensor

from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import last_norm, move_downsampling, rename

PATCH: Final = "patch_embed.projection.weight"
HEADS: Final = tuple(
    f"{head}.{part}"
    for head in ("head.layers.head", "head.layers.head_dist", "head.layers.pre_logits", "head.fc")
    for part in ("weight", "bias")
)
BLOCK_RULES: Final = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
VIT_RULES: Final = (
    *BLOCK_RULES,
    (r"^head\.(layers\.head|fc)\.", "head."),
    (r"^head\.layers\.", ""),
    (r"^(ln|norm)1\.", "norm."),  # the last norm is the first of those behind the blocks
    (r"^(ln|norm)2\.", "fc_norm."),
    (r"^pre_norm\.", "norm_pre."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.(attn|ffn)\.gamma(\d)\.weight$", r".ls\2.gamma"),
)
SWIN_RULES: Final = (*BLOCK_RULES, (r"^stages\.", "layers."), (r"\.attn\.w_msa\.", ".attn."))
TURNED: Final = [0, 2, 1, 3]  # the neighbours of a patch by rows, where Swin's authors go by columns; its own inverse


def _is_vit(shapes: Shapes) -> bool:
    return "layers.0.attn.qkv.weight" in shapes and "layers.0.ffn.layers.0.0.weight" in shapes


def _is_mmseg_vit(shapes: Shapes) -> bool:
    return "layers.0.attn.attn.in_proj_weight" in shapes and "layers.0.ffn.layers.0.0.weight" in shapes


def _is_swin(shapes: Shapes) -> bool:
    return "stages.0.blocks.0.attn.w_msa.relative_position_bias_table" in shapes


def _vit(tensors: Tensors) -> Tensors:
    return rename(tensors, VIT_RULES)


def _swin(tensors: Tensors) -> Tensors:
    named = {name: _merged(name, value) for name, value in rename(tensors, SWIN_RULES).items()}
    return last_norm(move_downsampling(named))


def _merged(name: str, value: Tensor) -> Tensor:
    """Patch merging reads channel by channel (C, 4), timm's neighbour by neighbour (4, C)."""
    if not re.fullmatch(r"layers\.\d+\.downsample\.(norm|reduction)\.(weight|bias)", name):
        return value
    return value.unflatten(-1, (-1, 4))[..., TURNED].transpose(-1, -2).flatten(-2)


VIT = Layout("mmpretrain ViT", PATCH, _is_vit, _vit, outside=HEADS)
MMSEG_VIT = Layout("mmseg ViT", PATCH, _is_mmseg_vit, _vit)
SWIN = Layout("OpenMMLab Swin", PATCH, _is_swin, _swin, outside=HEADS[-2:])
