"""Hugging Face transformers: ViT, DeiT, Swin, DINOv2, MAE, I-JEPA, CLIP, SigLIP, as version 5 and before name them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from pydantic import JsonValue

from kcrprune.checkpoints.clues import Clues, as_names, as_number
from kcrprune.checkpoints.layouts.base import Layout, Shapes, Tensors
from kcrprune.checkpoints.layouts.renaming import join_qkv, last_norm, move_downsampling, rename

PATCH = "embeddings.patch_embeddings.projection.weight"
HEADS = ("classifier.weight", "classifier.bias")
STAGE_NORMS = tuple(f"hidden_states_norms.stage{stage}.{part}" for stage in range(1, 5) for part in ("weight", "bias"))
TWO_HEADS = tuple(
    f"{head}.{part}" for head in ("cls_classifier", "distillation_classifier") for part in ("weight", "bias")
)

VIT_RULES: Final = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layers?|layers?)\.(\d+)\.", r"blocks.\2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
BLOCK_RULES: Final = (
    (r"\.attention\.(attention|self)\.query\.", ".attn.q."),
    (r"\.attention\.(attention|self)\.key\.", ".attn.k."),
    (r"\.attention\.(attention|self)\.value\.", ".attn.v."),
    (r"\.(attention|self_attn)\.([qkv])_proj\.", r".attn.\2."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
DISTILLED_RULE: Final = ((r"^embeddings\.distillation_token$", "dist_token"),)
# DeiT's classifier without the teacher's ignores what becomes of the token, as timm does with a register
REGISTER_RULE: Final = ((r"^embeddings\.distillation_token$", "reg_token"),)
SWIN_RULES: Final = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (
        r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$",
        ".attn.relative_position_bias_table",
    ),
    (r"\.attention\.self\.relative_position_index$", ".attn.relative_position_index"),
    *BLOCK_RULES,
    (r"^head\.", "head.fc."),
)
CLIP_RULES: Final = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"^visual_projection\.", "head."),
    *BLOCK_RULES,
)


SIGLIP_RULES: Final = (
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    *CLIP_RULES,
)


def _has(*names: str) -> Callable[[Shapes], bool]:
    return lambda shapes: all(name in shapes for name in names)


def _is_encoder(shapes: Shapes) -> bool:
    """A plain encoder of any of the models that share these names."""
    return "embeddings.position_embeddings" in shapes and any(
        name in shapes
        for name in ("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight",
                     "encoder.layer.0.norm1.weight")
    )  # fmt: skip


def _is_classifier_of_two_tokens(shapes: Shapes) -> bool:
    width = shapes.get("layernorm.weight", (0,))[0]
    return _is_encoder(shapes) and width > 0 and shapes.get("classifier.weight", (0, 0))[1:] == (2 * width,)


def _vit(tensors: Tensors) -> Tensors:
    return join_qkv(rename(tensors, (*VIT_RULES, *REGISTER_RULE, *BLOCK_RULES)))


def _distilled(tensors: Tensors) -> Tensors:
    return join_qkv(rename(tensors, (*VIT_RULES, *DISTILLED_RULE, *BLOCK_RULES)))


def _swin(tensors: Tensors) -> Tensors:
    """A backbone of a detector has norms behind its stages, and does not use the one behind all of them."""
    if any(name.startswith("hidden_states_norms.") for name in tensors):
        tensors = {name: value for name, value in tensors.items() if not re.match(r"(swin\.)?layernorm\.", name)}
    return last_norm(move_downsampling(join_qkv(rename(tensors, SWIN_RULES))))


def _clip(tensors: Tensors) -> Tensors:
    named = join_qkv(rename(tensors, CLIP_RULES))
    named.pop("embeddings.position_ids", None)
    named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    named["pos_embed"] = named["pos_embed"][None]
    if "head.weight" in named:
        named["head.bias"] = torch.zeros(len(named["head.weight"]))
    return named


def _siglip(tensors: Tensors) -> Tensors:
    """Pooled by attention: its q apart from k and v, as timm has them."""
    named = join_qkv(rename(tensors, SIGLIP_RULES))
    named["pos_embed"] = named["pos_embed"][None]
    for part in ("weight", "bias"):
        if (joined := named.pop(f"head.attention.in_proj_{part}", None)) is not None:
            width = len(joined) // 3
            named[f"attn_pool.q.{part}"], named[f"attn_pool.kv.{part}"] = joined[:width], joined[width:]
    return named


def _is_siglip(shapes: Shapes) -> bool:
    """Not NaFlex, whose patches are rows of a matrix."""
    return (
        len(shapes.get("embeddings.patch_embedding.weight", ())) == 4
        and "embeddings.class_embedding" not in shapes
        and "encoder.layers.0.self_attn.q_proj.weight" in shapes
        and "embeddings.position_embedding.weight" in shapes
    )


def _clues(norm_eps: float, act: str = "gelu") -> Callable[[Mapping[str, Any], Shapes], Clues]:
    """What config.json says, or else the library's defaults for a model."""

    def clues(config: Mapping[str, Any], shapes: Shapes) -> Clues:
        width = shapes.get("patch_embed.proj.weight", (0,))[0]
        config = config.get("vision_config", config) if isinstance(config.get("vision_config", {}), dict) else config
        if width not in (config.get("hidden_size"), config.get("embed_dim")):
            return Clues("Hugging Face's default", arguments={"act_layer": act}, norm_eps=norm_eps)
        eps = config.get("layer_norm_eps", norm_eps)
        classes = next((shapes[name][0] for name in ("head.weight", "head.fc.weight") if name in shapes), 0)
        return Clues(
            source="config.json",
            arguments=_arguments(config, act),
            norm_eps=eps if isinstance(eps, float) and 0 < eps < 1 else norm_eps,
            class_names=as_names(config.get("id2label"), classes),
        )

    return clues


def _arguments(config: Mapping[str, Any], act: str) -> dict[str, JsonValue]:
    arguments: dict[str, JsonValue] = {"act_layer": config.get("hidden_act", act)}
    if heads := as_number(config.get("num_attention_heads")):
        arguments["num_heads"] = heads
    if (size := config.get("image_size")) is not None:
        arguments["img_size"] = size
    return arguments


VIT = Layout("Hugging Face ViT", PATCH, _is_encoder, _vit, _clues(1e-12), HEADS, ("pooler.",))
DEIT = Layout(
    "Hugging Face DeiT", PATCH, _has("embeddings.distillation_token"), _vit, _clues(1e-12), HEADS, ("pooler.",)
)
DISTILLED_DEIT = Layout(
    "Hugging Face DeiT with teacher",
    PATCH,
    _has("embeddings.distillation_token", "distillation_classifier.weight"),
    _distilled,
    _clues(1e-12),
    TWO_HEADS,
    ("pooler.",),
)
MAE = Layout(
    "Hugging Face MAE",
    PATCH,
    _has("embeddings.position_embeddings", "decoder.decoder_pred.weight"),
    _vit,
    _clues(1e-12),
    ("decoder.decoder_pred.weight",),
    ("decoder.", "embeddings.mask_token"),
)
IJEPA = Layout(
    "Hugging Face I-JEPA",
    PATCH,
    lambda shapes: _is_encoder(shapes) and "embeddings.cls_token" not in shapes,
    _vit,
    _clues(1e-12),
    HEADS,
    ("pooler.", "embeddings.mask_token"),
)
REGISTERS = Layout("Hugging Face DINOv2 with registers", PATCH, _has("embeddings.register_tokens"), _vit, _clues(1e-6))
DINOV2_CLASSIFIER = Layout(
    "Hugging Face DINOv2",
    PATCH,
    _is_classifier_of_two_tokens,
    _vit,
    _clues(1e-6),
    HEADS,
    ("classifier.",),
    "its classifier reads the class token beside the mean of the patches, which timm's network cannot; it is left out",
)
DINOV2 = Layout("Hugging Face DINOv2", PATCH, _has("encoder.layer.0.layer_scale1.lambda1"), _vit, _clues(1e-6))
SWIN = Layout(
    "Hugging Face Swin",
    PATCH,
    lambda shapes: "encoder.layers.0.blocks.0.layernorm_before.weight" in shapes,
    _swin,
    _clues(1e-5),
    (*HEADS, *STAGE_NORMS),
    ("pooler.", "embeddings.mask_token"),
)
CLIP = Layout(
    "Hugging Face CLIP",
    "embeddings.patch_embedding.weight",
    _has("embeddings.class_embedding", "pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    _clip,
    _clues(1e-5, "quick_gelu"),
    ("visual_projection.weight",),
    ("embeddings.position_ids",),
    projects=True,
)
SIGLIP = Layout(
    "Hugging Face SigLIP",
    "embeddings.patch_embedding.weight",
    _is_siglip,
    _siglip,
    _clues(1e-6, "gelu_pytorch_tanh"),
    dropped=("embeddings.position_ids",),
)
