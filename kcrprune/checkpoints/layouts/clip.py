"""CLIP under its authors' names, which OpenCLIP's own ViTs have as well: the whole network, or its image tower."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from pydantic import JsonValue

from kcrprune.checkpoints.clues import Clues, as_number
from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import rename
from kcrprune.errors import UnsupportedModelError

PATCH: Final = "conv1.weight"
PUBLISHED: Final = ("input_resolution", "context_length", "vocab_size")  # numbers in the files that OpenAI published
PREPARED: Final[dict[str, JsonValue]] = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
RULES: Final = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.ls_(\d)\.", r".ls\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
RESIZES: Final = {"shortest": "center", "squash": "squash", "longest": "border"}


def _is_clip(shapes: Shapes) -> bool:
    return "class_embedding" in shapes and "transformer.resblocks.0.attn.in_proj_weight" in shapes


def _is_published(shapes: Shapes) -> bool:
    return _is_clip(shapes) and PUBLISHED[0] in shapes


def _convert(tensors: Tensors) -> Tensors:
    """The names of timm; the projection (width, outputs) is the head."""
    named = rename(tensors, RULES)
    named = {name: value for name, value in named.items() if name not in PUBLISHED}
    named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    named["pos_embed"] = named["pos_embed"][None]
    if "proj" in named:
        named["head.weight"] = named.pop("proj").T.contiguous()
        named["head.bias"] = torch.zeros(len(named["head.weight"]))
    return named


def _published(config: Mapping[str, Any], shapes: Shapes) -> Clues:
    """How OpenAI's own code builds the image tower."""
    width = shapes.get("patch_embed.proj.weight", (0,))[0]
    return Clues(
        source="OpenAI's code",
        arguments={"num_heads": max(1, width // 64), "act_layer": "quick_gelu"},
        norm_eps=1e-5,
        preprocessing=PREPARED,
    )


def _configured(config: Mapping[str, Any], shapes: Shapes) -> Clues:
    """What open_clip_config.json says of the image tower."""
    model, prepared = _table(config.get("model_cfg")), _table(config.get("preprocess_cfg"))
    vision = _table(model.get("vision_cfg"))
    width = shapes.get("patch_embed.proj.weight", (0,))[0]
    if vision.get("width") != width:
        return Clues("OpenCLIP's default", norm_eps=1e-5, preprocessing=PREPARED)
    if vision.get("final_ln_after_pool") or vision.get("input_patchnorm"):
        raise UnsupportedModelError("open_clip_config.json: its norms stand elsewhere than in timm's network")
    head_width = as_number(vision.get("head_width", 64))
    arguments: dict[str, JsonValue] = {"act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    if head_width:
        arguments["num_heads"] = max(1, width // head_width)
    if vision.get("pool_type") == "avg" or vision.get("global_average_pool"):
        arguments["global_pool"] = "avg"
    stated = {key: prepared[key] for key in ("mean", "std", "interpolation") if prepared.get(key)}
    mode = RESIZES.get(str(prepared.get("resize_mode", "shortest")))
    return Clues(
        source="open_clip_config.json",
        arguments=arguments,
        norm_eps=1e-5,
        preprocessing=PREPARED | stated | {"crop_mode": mode},
    )


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


OPENAI = Layout("OpenAI CLIP", PATCH, _is_published, _convert, _published, outside=PUBLISHED, projects=True)
OPEN_CLIP = Layout(
    "OpenCLIP",
    PATCH,
    _is_clip,
    _convert,
    _configured,
    doubt=(
        "networks of OpenAI's CLIP use QuickGELU, most of OpenCLIP's GELU, and their tensors are the same; "
        "--arch vit_base_patch32_clip_quickgelu_224 or vit_base_patch32_clip_224 (or another of timm's) says which, "
        "and so does OpenCLIP's open_clip_config.json beside the file"
    ),
    settled_by="act_layer",
    projects=True,
)
