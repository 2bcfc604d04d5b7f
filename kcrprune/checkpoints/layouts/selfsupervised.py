"""Self-supervised training code around timm-like ViTs: MAE, MoCo v3, DINOv2."""

import re

from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import rename

PATCH = "patch_embed.proj.weight"
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")


def _is_mae(shapes: Shapes) -> bool:
    return "blocks.0.attn.qkv.weight" in shapes and "decoder_pred.weight" in shapes


def _is_moco(shapes: Shapes) -> bool:
    return "blocks.0.attn.qkv.weight" in shapes and "head.0.weight" in shapes


def _is_dinov2(shapes: Shapes) -> bool:
    return "blocks.0.ls1.gamma" in shapes and "mask_token" in shapes


def _is_chunked(shapes: Shapes) -> bool:
    return "blocks.0.0.attn.qkv.weight" in shapes and "mask_token" in shapes


def _unchunked(tensors: Tensors) -> Tensors:
    """blocks.<chunk>.<block> as DINOv2 trains them, to blocks.<block>."""
    return rename(tensors, ((CHUNK.pattern, r"blocks.\1."),))


MAE = Layout("MAE", PATCH, _is_mae, dropped=("decoder_", "mask_token"))
MOCO = Layout("MoCo v3", PATCH, _is_moco, dropped=("head.",))
DINOV2_CHUNKED = Layout("DINOv2 in training", PATCH, _is_chunked, _unchunked)
DINOV2 = Layout("DINOv2", PATCH, _is_dinov2)
