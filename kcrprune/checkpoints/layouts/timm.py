"""Layouts with timm's names, and older names that timm's own conversion brings up to date."""

import torch

from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import last_norm, rename
from kcrprune.checkpoints.signatures import with_tensors

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


def _is_deit3(shapes: Shapes) -> bool:
    return _is_vit(shapes) and "blocks.0.gamma_1" in shapes


def _is_open_clip(shapes: Shapes) -> bool:
    return _is_vit(shapes) and "head.proj.weight" in shapes


def _open_clip(tensors: Tensors) -> Tensors:
    """The image tower of OpenCLIP, its projection as the head."""
    named = rename(tensors, ((r"^head\.proj\.", "head."),))
    named.setdefault("head.bias", torch.zeros(len(named["head.weight"])))
    return named


def _is_registered(shapes: Shapes) -> bool:
    return bool(with_tensors(shapes))


REGISTERED = Layout("timm", "", _is_registered)
OFFICIAL_SWIN = Layout("official Swin", PATCH, _is_official_swin, last_norm)
SWIN = Layout("timm Swin", PATCH, _is_swin, last_norm)
DISTILLED = Layout("distilled DeiT", PATCH, _is_distilled)
DEIT3 = Layout(
    "official DeiT III",
    PATCH,
    _is_deit3,
    doubt="DeiT III and rotary ViTs, which cannot be cut, have the same tensors; --arch deit3_... says it is the first",
    settled_by="wrapper",
)
OPEN_CLIP = Layout(
    "OpenCLIP around timm",
    PATCH,
    _is_open_clip,
    _open_clip,
    outside=("head.proj.weight", "head.proj.bias"),
    projects=True,
)
VIT = Layout("timm ViT", PATCH, _is_vit)
