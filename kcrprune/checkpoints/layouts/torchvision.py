"""torchvision's vit_* and swin_*."""

import re
from collections.abc import Mapping
from typing import Any, Final

from kcrprune.checkpoints.clues import Clues
from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import rename

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

VIT_RULES: Final = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
SWIN_RULES: Final = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)
# side of the resized image by (width, depths): torchvision.models.Swin_{T,S,B}_Weights
SWIN_RESIZE: Final[dict[tuple[int, ...], int]] = {
    (96, 2, 2, 6, 2): 232,
    (96, 2, 2, 18, 2): 246,
    (128, 2, 2, 18, 2): 238,
}


def _is_vit(shapes: Shapes) -> bool:
    return "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in shapes


def _vit(tensors: Tensors) -> Tensors:
    return rename(tensors, VIT_RULES)


def _vit_clues(config: Mapping[str, Any], shapes: Shapes) -> Clues:
    positions = shapes.get("pos_embed", (1, 197, 0))[1]
    if positions > 257:  # the SWAG weights of 384 pixels and more are not cropped
        return _recipe("bicubic", 1.0)
    return _recipe("bilinear", 224 / 256)


def _is_swin(shapes: Shapes) -> bool:
    return "features.1.0.attn.relative_position_bias_table" in shapes


def _swin(tensors: Tensors) -> Tensors:
    """Odd features are stages, even ones the patch merging in front of the next."""

    def stage(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"layers.{index // 2}.blocks." if index % 2 else f"layers.{index // 2}.downsample."

    named = rename(tensors, SWIN_RULES)
    return {re.sub(r"^features\.(\d+)\.", stage, name): value for name, value in named.items()}


def _swin_clues(config: Mapping[str, Any], shapes: Shapes) -> Clues:
    counts: dict[int, int] = {}
    for name in shapes:
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    width = shapes.get("patch_embed.proj.weight", (0,))[0]
    resized = SWIN_RESIZE.get((width, *(counts[stage] for stage in sorted(counts))))
    return _recipe("bicubic", 224 / resized) if resized else Clues()


def _recipe(interpolation: str, crop_pct: float) -> Clues:
    values = {"mean": MEAN, "std": STD, "interpolation": interpolation, "crop_pct": round(crop_pct, 4)}
    return Clues(source="torchvision's recipe", preprocessing=values)


VIT = Layout("torchvision ViT", "conv_proj.weight", _is_vit, _vit, _vit_clues)
SWIN = Layout("torchvision Swin", "features.0.0.weight", _is_swin, _swin, _swin_clues)
