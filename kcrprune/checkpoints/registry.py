"""What is known of timm's networks by name: the sizes and traits that their registered arguments give.

The table lies in registry.json, one network a line; `python docs/networks.py` writes it from the installed timm.
"""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from pydantic import JsonValue

from kcrprune.errors import ConfigError, UnsupportedModelError

Kind = Literal["vit", "distilled", "swin"]
MODULES = ("vision_transformer", "deit", "swin_transformer")  # timm's modules whose classes a family covers


@dataclass(frozen=True)
class Known:
    """A registered network: timm's arguments under timm's names. Tuples have one entry for each stage of a Swin."""

    name: str
    kind: Kind
    embed_dim: int
    depth: int | tuple[int, ...]
    num_heads: int | tuple[int, ...]
    hidden: int  # units of the (first) MLP
    patch_size: int
    img_size: int | tuple[int, int]
    num_classes: int = 1000
    in_chans: int = 3
    window_size: int | tuple[Any, ...] | None = None  # one for all, one a stage, or (height, width) a stage
    qkv_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    pos_embed: bool = True
    global_pool: str = "token"
    act: str = "GELU"
    norm_eps: float = 1e-6

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What identifies the number of heads in practice."""
        return self.kind == "swin", self.embed_dim, self.depth, self.hidden


@cache
def table() -> tuple[Known, ...]:
    """Every registered network that a family of kcrprune covers, in timm's order."""
    lines = files("kcrprune.checkpoints").joinpath("registry.json").read_text("utf-8")
    return tuple(_from_row(row) for row in json.loads(lines))


def known(name: str) -> Known:
    """The network that timm registers as `name`; ConfigError for a name that it does not know."""
    bare = bare_name(name)
    for row in table():
        if row.name == bare:
            return row
    return _measured(bare)


def bare_name(name: str) -> str:
    """The network in a longer name, such as hf-hub:timm/vit_small_patch16_224.augreg_in1k."""
    return name.rsplit("/", 1)[-1].split(".", 1)[0]


def _measured(name: str) -> Known:
    import timm

    from kcrprune.families import family_of, outlining

    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, [row.name for row in table()], 3))
        hint = f"; near it: {near}" if near else ""
        raise ConfigError(f"timm has no network called {name!r}{hint}")
    try:
        with outlining():
            model = timm.create_model(name, pretrained=False)
    except (NotImplementedError, RuntimeError) as error:  # it computes with its weights while it is built
        raise UnsupportedModelError(f"{name} cannot be looked at without its weights, so it cannot be cut") from error
    family_of(model)
    if not (timm.models.is_model_in_modules(name, MODULES) and is_plain(model)):
        raise UnsupportedModelError(
            f"{name} has parts that cannot be told from shapes; a file of its registered sizes opens without --arch"
        )
    return describe(name, model)


def is_plain(model: Any) -> bool:
    """Whether shapes tell a network: every block of timm's first kind, whose parts the rows below have a word for."""
    parts = {
        type(part).__name__
        for block in model.modules()
        if hasattr(block, "attn") and hasattr(block, "mlp")
        for part in (block, block.attn, block.mlp)
    }
    plain = ({"Block", "Attention", "Mlp"}, {"SwinTransformerBlock", "WindowAttention", "Mlp"})
    gated = any(getattr(module, "gate", None) is not None for module in model.modules())
    return parts in plain and not gated


def describe(name: str, model: Any) -> Known:
    """The row of a network that timm built as `name`."""
    described = _describe_swin(model) if hasattr(model, "layers") else _describe_vit(model)
    common = {
        "embed_dim": model.embed_dim,
        "patch_size": model.patch_embed.patch_size[0],
        "img_size": model.patch_embed.img_size[0],
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
    }
    return Known(name=name, **common, **described)


def _describe_vit(model: Any) -> dict[str, Any]:
    block = model.blocks[0]
    norms = (model.norm, model.fc_norm, block.norm1)
    return {
        "kind": "distilled" if hasattr(model, "dist_token") else "vit",
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": _has(block.attn.q_norm),
        "scale_attn_norm": _has(block.attn.norm),
        "scale_mlp_norm": _has(block.mlp.norm),
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "layer_scale": _has(block.ls1),
        "pre_norm": _has(model.norm_pre),
        "final_norm": _has(model.norm) or _has(model.fc_norm),
        "fc_norm": _has(model.fc_norm),
        "pos_embed": model.pos_embed is not None,
        "act": type(block.mlp.act).__name__,
        "norm_eps": next(norm.eps for norm in norms if _has(norm)),
    }


def _describe_swin(model: Any) -> dict[str, Any]:
    blocks = [stage.blocks[0] for stage in model.layers]
    windows = tuple(block.window_size[0] for block in blocks)
    return {
        "kind": "swin",
        "depth": tuple(len(stage.blocks) for stage in model.layers),
        "num_heads": tuple(block.attn.num_heads for block in blocks),
        "hidden": blocks[0].mlp.fc1.out_features,
        "window_size": windows[0] if len(set(windows)) == 1 else windows,
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "class_token": False,
        "pos_embed": False,
        "norm_eps": model.norm.eps,
    }


def _has(module: Any) -> bool:
    return type(module).__name__ != "Identity"


def _from_row(row: dict[str, JsonValue]) -> Known:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Known(**cast(Any, values))
