"""Rules for the modules of other libraries, by the names of their classes: none of these libraries is loaded for it.

Such a module keeps its own forward. So of an attention whole heads alone may go, and only where that forward takes the
number of heads from the width of its tensors; of an MLP any hidden unit.
"""

from typing import Any, Final

from torch import nn

from kcrprune.families.contract import Branch, Group, Rule, Slot, owner_of


def hidden_units(*writers: str, reader: str) -> Rule:
    """The rule of an MLP: linears that write its hidden units, and the one that reads them, by name inside it.

    Between them each unit is by itself: activations, and the product of two writers. A module where one of the names is
    no linear has no groups.
    """

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        linears = [_linear(module, name) for name in (*writers, reader)]
        if not _all_linear(linears):
            return ()
        hidden = linears[-1].in_features
        if any(linear.out_features != hidden for linear in linears[:-1]):
            return ()
        written = tuple(Slot(f"{site}.{name}", 0) for name in writers)
        return (Group(site, "mlp_hidden", 1, hidden, written, (Slot(f"{site}.{reader}", 1),)),)

    return groups


def whole_heads(
    query: str, key: str, value: str, *, out: str, size: str = "head_dim", tables: tuple[Slot, ...] = ()
) -> Rule:
    """The rule of an attention whose forward splits its linears' outputs by the size of a head.

    `size` is the attribute that holds it, `tables` are tensors with one entry a head. Its channels stay, as one size
    serves q, k and v; whole heads may go. No groups where a name is no linear, or heads share their keys.
    """

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        linears = [_linear(module, name) for name in (query, key, value, out)]
        width = getattr(module, size, None)
        if not _all_linear(linears) or not isinstance(width, int):
            return ()
        inner = linears[-1].in_features
        if inner % width or any(linear.out_features != inner for linear in linears[:-1]):
            return ()

        def written(*names: str) -> tuple[Slot, ...]:
            return tuple(Slot(f"{site}.{name}", 0, 0, width) for name in names)

        heads, read = inner // width, (Slot(f"{site}.{out}", 1, 0, width),)
        return (
            Group(site, "attn_query", heads, width, written(query, key), basis="fixed", whole=True),
            Group(site, "attn_value", heads, width, written(value), read, basis="fixed", whole=True),
            Group(site, "heads", 1, heads, per_head=tuple(table.below(site) for table in tables)),
        )

    return groups


def _linear(module: nn.Module, name: str) -> Any:
    try:
        return owner_of(module, name)
    except AttributeError:
        return None


def _all_linear(parts: list[Any]) -> bool:
    return all(type(part) is nn.Linear for part in parts)


def _hugging_face(model: str, names: dict[str, Any]) -> dict[type | str, Any]:
    return {f"transformers.models.{model}.modeling_{model}:{name}": entry for name, entry in names.items()}


_PLAIN: Final = hidden_units("fc1", reader="fc2")
_GATED: Final = hidden_units("gate_proj", "up_proj", reader="down_proj")
_HEADS: Final = whole_heads("q_proj", "k_proj", "v_proj", out="o_proj")
_CLIP_HEADS: Final = whole_heads("q_proj", "k_proj", "v_proj", out="out_proj")
_WINDOW_HEADS: Final = whole_heads(
    *("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    tables=(Slot("relative_position_bias.relative_position_bias_table", 1),),
)
_SEQUENTIAL: Final = hidden_units("0", reader="3")  # linear, activation, dropout, linear

FOREIGN: Final[dict[type | str, Rule]] = {
    **_hugging_face("vit", {"ViTMLP": _PLAIN, "ViTAttention": _HEADS}),
    **_hugging_face("deit", {"DeiTMLP": _PLAIN, "DeiTAttention": _HEADS}),
    **_hugging_face("vit_mae", {"ViTMAEMLP": _PLAIN, "ViTMAEAttention": _HEADS}),
    **_hugging_face("vit_msn", {"ViTMSNMLP": _PLAIN, "ViTMSNAttention": _HEADS}),
    **_hugging_face("ijepa", {"IJepaMLP": _PLAIN, "IJepaAttention": _HEADS}),
    **_hugging_face("dinov2", {"Dinov2MLP": _PLAIN, "Dinov2SwiGLUFFN": _GATED, "Dinov2Attention": _HEADS}),
    **_hugging_face(
        "dinov2_with_registers",
        {
            "Dinov2WithRegistersMLP": _PLAIN,
            "Dinov2WithRegistersSwiGLUFFN": _GATED,
            "Dinov2WithRegistersAttention": _HEADS,
        },
    ),
    **_hugging_face(
        "dinov3_vit",
        {
            "DINOv3ViTMLP": hidden_units("up_proj", reader="down_proj"),
            "DINOv3ViTGatedMLP": _GATED,
            "DINOv3ViTAttention": _HEADS,
        },
    ),
    **_hugging_face("swin", {"SwinMLP": _PLAIN, "SwinAttention": _WINDOW_HEADS}),
    **_hugging_face("clip", {"CLIPMLP": _PLAIN, "CLIPAttention": _CLIP_HEADS}),
    **_hugging_face("siglip", {"SiglipMLP": _PLAIN, "SiglipAttention": _CLIP_HEADS}),
    **_hugging_face("siglip2", {"Siglip2MLP": _PLAIN, "Siglip2Attention": _CLIP_HEADS}),
    "torchvision.ops.misc:MLP": _SEQUENTIAL,
    "torchvision.models.vision_transformer:MLPBlock": _SEQUENTIAL,
}

_BEFORE_AFTER: Final = {
    "attention": Branch("layernorm_before", behind="layernorm_after"),
    "mlp": Branch("layernorm_after"),
}
_SCALED: Final = {
    "attention": Branch("norm1", "layer_scale1.lambda1", "norm2"),
    "mlp": Branch("norm2", "layer_scale2.lambda1"),
}
_TOWER: Final = {"self_attn": Branch("layer_norm1", behind="layer_norm2"), "mlp": Branch("layer_norm2")}

FOREIGN_BLOCKS: Final[dict[type | str, dict[str, Branch]]] = {
    **_hugging_face("vit", {"ViTLayer": _BEFORE_AFTER}),
    **_hugging_face("deit", {"DeiTLayer": _BEFORE_AFTER}),
    **_hugging_face("vit_mae", {"ViTMAELayer": _BEFORE_AFTER}),
    **_hugging_face("vit_msn", {"ViTMSNLayer": _BEFORE_AFTER}),
    **_hugging_face("ijepa", {"IJepaLayer": _BEFORE_AFTER}),
    **_hugging_face("swin", {"SwinLayer": _BEFORE_AFTER}),
    **_hugging_face("dinov2", {"Dinov2Layer": _SCALED}),
    **_hugging_face("dinov3_vit", {"DINOv3ViTLayer": _SCALED}),
    **_hugging_face("dinov2_with_registers", {"Dinov2WithRegistersLayer": _SCALED}),
    **_hugging_face("clip", {"CLIPEncoderLayer": _TOWER}),
    **_hugging_face("siglip", {"SiglipEncoderLayer": _TOWER}),
    **_hugging_face("siglip2", {"Siglip2EncoderLayer": _TOWER}),
    "torchvision.models.vision_transformer:EncoderBlock": {"mlp": Branch("ln_2")},
    "torchvision.models.swin_transformer:SwinTransformerBlock": {"mlp": Branch("norm2")},
}

REASONS: Final[dict[type | str, str]] = {  # why a class has no rule
    "torch.nn.modules.activation:MultiheadAttention": "its forward wants heads that fill the width of the stream",
    "torchvision.models.swin_transformer:ShiftedWindowAttention": "its forward divides the stream's width by its heads",
    "torchvision.models.swin_transformer:ShiftedWindowAttentionV2": (
        "its forward divides the stream's width by its heads"
    ),
}
