"""Layouts with timm's names, and older names that timm's own conversion brings up to date."""

from kcrprune.artifact.layouts.base import Layout, Shapes

PATCH = "patch_embed.proj.weight"


def _is_vit(shapes: Shapes) -> bool:
    return "blocks.0.attn.qkv.weight" in shapes and "blocks.0.mlp.fc1.weight" in shapes


def _is_distilled(shapes: Shapes) -> bool:
    return _is_vit(shapes) and "dist_token" in shapes


def _is_swin(shapes: Shapes) -> bool:
    return "layers.0.blocks.0.attn.relative_position_bias_table" in shapes and "patch_embed.norm.weight" in shapes


def _is_official_swin(shapes: Shapes) -> bool:
    buffers = any(name.endswith(("attn_mask", "relative_position_index")) for name in shapes)
    return _is_swin(shapes) and (buffers or "layers.0.downsample.reduction.weight" in shapes)


OFFICIAL_SWIN = Layout("official Swin", PATCH, _is_official_swin)
SWIN = Layout("timm Swin", PATCH, _is_swin)
DISTILLED = Layout("distilled DeiT", PATCH, _is_distilled)
VIT = Layout("timm ViT", PATCH, _is_vit)
