"""A network measured from the shapes of its tensors under timm's names: everything that shapes can tell.

Letters: D width, H hidden units, N positions of the table, p patch.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from kcrprune.checkpoints.clues import Evidence
from kcrprune.checkpoints.registry import Known
from kcrprune.checkpoints.signatures import CLASSIFIER
from kcrprune.checkpoints.sizes import Size, stated_size, table_size, windowed_size
from kcrprune.containers.contents import Shape
from kcrprune.errors import CheckpointError, UnsupportedModelError
from kcrprune.plan import sides

Shapes = Mapping[str, Shape]
DEEPEST = 160  # ours; timm's deepest network has 48 blocks
POOLS = ("token", "avg", "avgmax", "max", "map", "prr")


def measure(shapes: Shapes, evidence: Evidence) -> Known:
    """The network of these shapes; `num_heads` is 0 where they do not tell it, the name is empty.

    CheckpointError or UnsupportedModelError, without the file's name, where they are no network's.
    """
    if any(re.match(r"layers\.\d+\.blocks\.", name) for name in shapes):
        return _measure_swin(shapes, evidence)
    return _measure_vit(shapes, evidence)


def _measure_vit(shapes: Shapes, evidence: Evidence) -> Known:
    depth = _count(shapes, r"blocks\.(\d+)\.")
    _check_alike(shapes, [f"blocks.{index}." for index in range(depth)])
    width, channels, patch = _patch(shapes)
    registers = next((_shape(shapes, name, 3)[1] for name in ("reg_token", "register_tokens") if name in shapes), 0)
    prefix = ("cls_token" in shapes) + ("dist_token" in shapes) + registers
    size, no_embed_class = _size(shapes, prefix, evidence)
    fc_norm = "fc_norm.weight" in shapes
    return Known(
        name="",
        kind="distilled" if "dist_token" in shapes else "vit",
        embed_dim=width,
        depth=depth,
        num_heads=0,
        hidden=_shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        img_size=size,
        num_classes=classes_of(shapes),
        in_chans=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        scale_attn_norm="blocks.0.attn.norm.weight" in shapes,
        scale_mlp_norm="blocks.0.mlp.norm.weight" in shapes,
        class_token="cls_token" in shapes,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        layer_scale="blocks.0.ls1.gamma" in shapes or "blocks.0.gamma_1" in shapes,
        pre_norm="norm_pre.weight" in shapes,
        final_norm=fc_norm or "norm.weight" in shapes,
        fc_norm=fc_norm,
        pos_embed="pos_embed" in shapes,
        global_pool=_pool(shapes, evidence),
    )


def _size(shapes: Shapes, tokens: int, evidence: Evidence) -> tuple[Size, bool]:
    """The image, and whether the position table leaves the `tokens` prefix tokens out."""
    patch = _patch(shapes)[2]
    if "pos_embed" not in shapes:
        size, _ = stated_size(evidence)
        if size is None or any(side % patch for side in sides(size)):
            raise UnsupportedModelError("it has no position table, so its positions are rotary or relative")
        return size, False
    own_register = "register_tokens" in shapes  # DINOv2's own file: its table has the class token but not the registers
    size, prefix = table_size(_shape(shapes, "pos_embed", 3)[1], (1 if own_register else tokens, 0), patch, evidence)
    return size, own_register or prefix < tokens


def _pool(shapes: Shapes, evidence: Evidence) -> str:
    if any(name.startswith("attn_pool.") for name in shapes):
        return "map" if "attn_pool.latent" in shapes else "prr"
    said, _ = evidence.argument("global_pool")
    if said in POOLS[:4] and not (said == "token" and "cls_token" not in shapes):
        return str(said)
    return "avg" if "fc_norm.weight" in shapes or "cls_token" not in shapes else "token"


def _measure_swin(shapes: Shapes, evidence: Evidence) -> Known:
    width, channels, patch = _patch(shapes)
    stages = _count(shapes, r"layers\.(\d+)\.")
    depths = tuple(_count(shapes, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    positions, heads = [], []
    for stage, depth in enumerate(depths):
        _check_alike(shapes, [f"layers.{stage}.blocks.{index}." for index in range(depth)])
        entries, columns = _shape(shapes, f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        positions.append(entries)
        heads.append(columns)
    img_size, window = windowed_size(shapes, patch, positions, evidence)
    return Known(
        name="",
        kind="swin",
        embed_dim=width,
        depth=depths,
        num_heads=tuple(heads),
        hidden=_shape(shapes, "layers.0.blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        img_size=img_size,
        num_classes=classes_of(shapes),
        in_chans=channels,
        window_size=window,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in shapes,
        class_token=False,
        pos_embed=False,
        global_pool="avg",
        norm_eps=1e-5,
    )


def _patch(shapes: Shapes) -> tuple[int, int, int]:
    """D, channels, p of the patch embedding; (D, C, p, p), or (D, C p p) in timm's oldest files."""
    shape = shapes.get("patch_embed.proj.weight", ())
    if len(shape) == 2:
        side = isqrt(shape[1] // 3)
        shape = (shape[0], 3, side, side)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise UnsupportedModelError(f"the patch embedding has the shape {shape}, not (width, channels, patch, patch)")
    return shape[0], shape[1], shape[2]


def classes_of(shapes: Shapes) -> int:
    """Outputs of the classifier, 0 where there is none."""
    found = [name for name, shape in shapes.items() if CLASSIFIER.match(name) and len(shape) == 2]
    return shapes[max(found)][0] if found else 0


def _count(shapes: Shapes, pattern: str) -> int:
    """How many consecutive indices from 0 the names have at a place."""
    matched = (re.match(pattern, name) for name in shapes)
    indices = {int(match.group(1)) for match in matched if match and len(match.group(1)) < 6}
    if indices != set(range(len(indices))) or not 0 < len(indices) <= DEEPEST:
        raise CheckpointError(
            f"the file has {len(indices)} numbered blocks or stages, not a gapless row of up to {DEEPEST}"
        )
    return len(indices)


def _check_alike(shapes: Shapes, blocks: list[str]) -> None:
    """Every block has the linears of the first; otherwise one small file could describe a huge network."""
    hidden, read = (_shape(shapes, blocks[0] + name, 2) for name in ("mlp.fc1.weight", "mlp.fc2.weight"))
    if hidden[0] == 2 * read[1]:
        raise UnsupportedModelError(
            f"its MLP is gated (SwiGLU): fc1 makes {hidden[0]} channels and fc2 reads {read[1]}"
        )
    for part in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
        wanted = _shape(shapes, blocks[0] + part, 2)
        for block in blocks:
            if _shape(shapes, block + part, 2) != wanted:
                raise UnsupportedModelError(
                    f"{block}{part} is {shapes[block + part]} where the first block has {wanted}; "
                    "a network that was pruned by other means cannot be opened "
                    "(the weights of one that kcrprune cut: load_state_dict into kcrprune.load's, then kcrprune.save)"
                )


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[Any, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        found = "is missing" if shape is None else f"has the shape {shape}"
        raise CheckpointError(f"this is not a complete ViT or Swin: {name} {found}")
    return shape
