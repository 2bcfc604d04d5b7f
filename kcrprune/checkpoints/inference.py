"""From a measured network to a timm name with arguments, with one sentence for each thing that shapes cannot tell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import timm
from pydantic import JsonValue
from torch import nn

from kcrprune.checkpoints import signatures
from kcrprune.checkpoints.clues import ASKED, Evidence, as_size
from kcrprune.checkpoints.loading import build_outline, built_for_size
from kcrprune.checkpoints.registry import Kind, Known, bare_name, known, table
from kcrprune.checkpoints.shapes import Shapes, classes_of, measure
from kcrprune.checkpoints.sizes import stated_size
from kcrprune.containers.contents import shapes_of
from kcrprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from kcrprune.families import family_of
from kcrprune.plan import Architecture, sides, size_text

# a network of each kind whose arguments are overridden where no known one has the sizes
PLAIN: Final[dict[Kind, str]] = {
    "vit": "vit_base_patch16_224",
    "distilled": "deit_base_distilled_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
}
KINDS: Final[dict[Kind, str]] = {
    "vit": "VisionTransformer",
    "distilled": "distilled VisionTransformer",
    "swin": "SwinTransformer",
}
STATED: Final = ("num_heads", "global_pool", "img_size", "act_layer")  # what equal tensors may be used with
TRAITS: Final = (
    "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "class_token", "reg_tokens", "no_embed_class",
    "layer_scale", "pre_norm", "final_norm", "fc_norm", "pos_embed", "global_pool", "window_size",
)  # fmt: skip
ACTIVATIONS: Final[dict[str, str]] = {
    "gelu": "GELU",
    "quick_gelu": "QuickGELU",
    "gelu_tanh": "GELUTanh",
    "gelu_pytorch_tanh": "GELUTanh",
}


@dataclass(frozen=True)
class Inferred:
    """What the network is; `certain` is False where the name only lends its class and not its sizes."""

    architecture: Architecture
    in_chans: int
    img_size: int | tuple[int, int]  # one number, or (height, width)
    patch_size: int
    num_classes: int
    certain: bool
    notes: tuple[str, ...]
    sized: bool = True  # timm builds it for an image of one size

    def changed(self, **arguments: Any) -> Self:
        """The same network with other arguments, of those named above."""
        told = {key: _json(value) for key, value in arguments.items() if key != "img_size" or self.sized}
        stated = {**self.architecture.arguments, **told}
        return replace(self, **arguments, architecture=self.architecture.model_copy(update={"arguments": stated}))


def infer(shapes: Shapes, evidence: Evidence, path: Path) -> Inferred:
    """The timm name and arguments of a network; CheckpointError with the way out where something cannot be known."""
    names = signatures.with_tensors(shapes)
    if found := _registered(names, shapes, evidence, path):
        return found
    try:
        measured = measure(shapes, evidence)
    except (CheckpointError, UnsupportedModelError) as error:
        if names:
            raise CheckpointError(
                f"{path} has the tensors of {' and of '.join(names)}, and does not tell how it uses them; say --arch"
            ) from error
        raise type(error)(f"{path}: {error}") from error
    base, certain, notes = _base(measured, evidence)
    if not measured.num_heads:
        heads, why = _heads(measured, base, evidence, path)
        measured = replace(measured, num_heads=heads)
        notes = (*notes, why)
    else:
        notes = (*notes, f"heads {measured.num_heads}: columns of the position bias tables")
    notes = (*notes, _image_note(measured, shapes, evidence))
    act, act_note = _activation(measured, base, evidence)
    network = replace(measured, name=base.name, act=act, norm_eps=base.norm_eps)
    eps, eps_source = evidence.norm_eps
    if eps is not None and eps != base.norm_eps:
        notes = (*notes, f"layer norms use epsilon {eps:g}: {eps_source}")
    elif eps is None and not certain:
        notes = (*notes, f"layer norms use epsilon {base.norm_eps:g}: assumed, the file does not tell")
    architecture = Architecture(
        family="swin" if measured.kind == "swin" else "vit",
        name=base.name,
        arguments=difference(network, base),
        norm_eps=None if eps == base.norm_eps else eps,
    )
    return Inferred(
        architecture,
        in_chans=network.in_chans,
        img_size=network.img_size,
        patch_size=network.patch_size,
        num_classes=network.num_classes,
        certain=certain,
        notes=(*notes, *act_note),
    )


def _registered(names: Sequence[str], shapes: Shapes, evidence: Evidence, path: Path) -> Inferred | None:
    """The registered network of these tensors; None where the file does not tell which, or contradicts them all."""
    name, why = _chosen(names, evidence)
    said: dict[str, JsonValue] = {key: evidence.argument(key)[0] for key in STATED}
    asked = stated_size(evidence)[0] or as_size(evidence.usual_size)
    said["img_size"] = _json(asked) if name and takes_size(name) else None
    stated: dict[str, JsonValue] = {key: value for key, value in said.items() if value is not None}
    if not name or stated.get("act_layer", "gelu") not in tuple(ACTIVATIONS):
        return None
    try:
        model: Any = build_outline(Architecture(family="", name=name, arguments=stated), path)
    except CheckpointError:  # timm has no such arguments
        return None
    if signatures.tensors(shapes_of(model.state_dict())) != signatures.table()[name].tensors:
        return None
    if signatures.behaviour(model) == signatures.table()[name].behaviour:
        stated = {}
    patches = getattr(model, "patch_embed", None)
    usual = getattr(timm.get_pretrained_cfg(name), "input_size", (3,))
    size = as_size(getattr(patches, "img_size", None)) or asked or as_size(usual[1:])
    if size is None:
        return None
    classes = classes_of(shapes)
    eps, eps_source = evidence.norm_eps
    own = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    notes = [f"{key} {value}: {evidence.argument(key)[1]}" for key, value in stated.items()]
    if eps is not None and own != {eps}:
        notes.append(f"layer norms use epsilon {eps:g}: {eps_source}")
    found = Inferred(
        Architecture(family=family_of(model), name=name, arguments=stated, norm_eps=None if own == {eps} else eps),
        in_chans=getattr(model, "in_chans", usual[0]),
        img_size=size,
        patch_size=_first(getattr(patches, "patch_size", 1)),
        num_classes=classes,
        certain=True,
        notes=(f"architecture {name}: {why}", *notes),
        sized=takes_size(name),
    )
    return found if classes == model.num_classes else found.changed(num_classes=classes)


@cache
def takes_size(name: str) -> bool:
    """Whether timm builds a registered network for images of a size; others take any."""
    return built_for_size(build_outline(Architecture(family="", name=name), Path()))


def _first(value: Any) -> int:
    return value[0] if isinstance(value, tuple | list) else int(value or 1)


def _chosen(names: Sequence[str], evidence: Evidence) -> tuple[str, str]:
    """The network among those of equal tensors that is named, or any where they are alike, and why; else ("", "")."""
    said, source = next(iter(evidence.names), ("", ""))
    if said:
        return (bare_name(said), f"{source}, and its tensors") if bare_name(said) in names else ("", "")
    alike = len({signatures.table()[name].behaviour for name in names}) == 1
    return (names[0], f"its tensors are those of {' and '.join(names)}") if alike else ("", "")


def _base(measured: Known, evidence: Evidence) -> tuple[Known, bool, tuple[str, ...]]:
    """The registered network that the file's is described by, whether it is sure, and how that is known."""
    for name, source in evidence.names[:1]:
        row = _named(measured, name, source)
        sizes = "" if row.sizes == measured.sizes else f", with the sizes of the file: {_sizes(measured)}"
        return row, True, (f"architecture {row.name}: {source}{sizes}",)
    ranked = sorted(_same_size(measured), key=lambda row: _distance(row, measured, evidence))
    if not ranked:
        row = known(PLAIN[measured.kind])
        note = f"architecture {row.name} with other sizes: timm knows none of {_sizes(measured)}"
        return row, False, (note,)
    best = ranked[0]
    other = ", ".join(trait for trait in TRAITS if getattr(best, trait) != getattr(measured, trait))
    parts = f"sizes are the file's, which has other parts ({other})" if other else "sizes and parts are the file's"
    return best, True, (f"architecture {best.name}: its {parts}", *_twins(ranked))


def _twins(ranked: Sequence[Known]) -> tuple[str, ...]:
    """What cannot be told from the networks that fit as well as the first, which is taken."""

    def shapes(row: Known) -> Known:
        return replace(row, name="", act="", num_classes=0)

    best = ranked[0]
    twins = [row for row in ranked[1:] if shapes(row) == shapes(best)]
    notes = []
    if same := [row.name for row in twins if row.act == best.act]:
        notes.append(f"same shapes, perhaps another preprocessing: {', '.join(same)}; --arch chooses")
    if other := [f"{row.act} in {row.name}" for row in twins if row.act != best.act]:
        notes.append(f"activation {best.act}: not in the file ({', '.join(other)}); --arch chooses")
    return tuple(notes)


def _named(measured: Known, name: str, source: str) -> Known:
    row = known(name)
    if row.kind != measured.kind:
        sentence = f"the file holds a {KINDS[measured.kind]}, but {name} ({source}) is a {KINDS[row.kind]}"
        if source == ASKED:
            raise ConfigError(f"{sentence}; leave it out or name a network of the right kind")
        raise CheckpointError(f"{sentence}; --arch says which it is")
    return row


def _sizes(measured: Known) -> str:
    return f"width {measured.embed_dim}, depth {measured.depth}, hidden {measured.hidden}"


def _same_size(measured: Known) -> list[Known]:
    return [row for row in table() if row.kind == measured.kind and row.sizes == measured.sizes]


def _distance(row: Known, measured: Known, evidence: Evidence) -> tuple[int, ...]:
    """Orders the networks of one size: different parts first, then patch, image and classes, last the look."""
    parts = sum(getattr(row, trait) != getattr(measured, trait) for trait in TRAITS)
    alike = next((index for index, start in enumerate(evidence.resembles) if row.name.startswith(start)), 9)
    return (
        parts,
        row.act != "GELU",  # the plain one where the file cannot tell
        abs(row.patch_size - measured.patch_size),
        sum(abs(own - side) for own, side in zip(sides(row.img_size), sides(measured.img_size), strict=True)),
        row.num_classes != measured.num_classes,
        alike,
    )


def _heads(measured: Known, base: Known, evidence: Evidence, path: Path) -> tuple[int, str]:
    said, source = evidence.argument("num_heads")
    name, name_source = next(iter(evidence.names), (None, ""))
    if said is not None:
        if type(said) is not int or said < 1 or measured.embed_dim % said:
            raise ConfigError(f"{said!r} heads ({source}) do not divide the width {measured.embed_dim} of {path}")
        return said, f"heads {said}: {source}"
    named = name is not None and base.name == bare_name(name)
    if named and base.embed_dim == measured.embed_dim and isinstance(base.num_heads, int):
        return base.num_heads, f"heads {base.num_heads}: {base.name} ({name_source})"
    rows = _same_size(measured)
    alike = [row for row in rows if all(getattr(row, t) == getattr(measured, t) for t in TRAITS)] or rows
    counts = sorted({row.num_heads for row in alike if isinstance(row.num_heads, int)})
    if len(counts) != 1:
        raise CheckpointError(_ask_for_heads(measured, alike, path))
    return counts[0], (
        f"heads {counts[0]}: every network of timm with width {measured.embed_dim}, depth {measured.depth} and "
        f"{measured.hidden} hidden units has them ({len(alike)} in the table)"
    )


def _ask_for_heads(measured: Known, rows: Sequence[Known], path: Path) -> str:
    sizes = f"width {measured.embed_dim}, depth {measured.depth} and {measured.hidden} hidden units"
    if rows:
        candidates = ", ".join(f"{row.name} has {row.num_heads}" for row in rows[:6])
        return f"{path}: known networks with {sizes} differ in their heads ({candidates}); say --arch or --num-heads"
    divisors = [heads for heads in range(1, 65) if measured.embed_dim % heads == 0]
    likely = ", ".join(
        f"{heads} (of {measured.embed_dim // heads} channels)"
        for heads in divisors
        if 16 <= measured.embed_dim // heads <= 128
    )
    candidates = f"; candidates: {likely}" if likely else ""
    return (
        f"{path}: the number of heads is not in the file and no known network has {sizes}; say --num-heads{candidates}"
    )


def _image_note(measured: Known, shapes: Shapes, evidence: Evidence) -> str:
    """How the image size is known."""
    said, source = evidence.argument("img_size")
    if measured.kind != "swin" and measured.pos_embed:
        source = "the position table"
    elif said is None:
        masked = "layers.0.blocks.1.attn_mask" in shapes
        assumed = "not in the file, so the smallest whose last stage is one window (--img-size changes it)"
        source = "the attention masks" if masked else assumed
    return f"image size {size_text(measured.img_size)}, patches of {measured.patch_size}: {source}"


def _activation(measured: Known, base: Known, evidence: Evidence) -> tuple[str, tuple[str, ...]]:
    said, source = evidence.argument("act_layer")
    if said is None:
        return base.act, ()
    if not isinstance(said, str) or said not in ACTIVATIONS:
        raise CheckpointError(
            f"the activation {said!r} ({source}) is not one that kcrprune knows: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[said], (f"activation {said}: {source}",) if ACTIVATIONS[said] != base.act else ()


def difference(network: Known, base: Known) -> dict[str, JsonValue]:
    """The timm arguments that turn the registered `base` into `network`."""
    plain = ("embed_dim", "patch_size", "img_size", "num_classes", "in_chans", "qkv_bias")
    if network.kind == "swin":
        arguments = _changed(network, base, (*plain, "num_heads", "window_size"))
        if network.depth != base.depth:
            arguments["depths"] = _json(network.depth)
    else:
        flags = ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "class_token", "reg_tokens", "no_embed_class",
                 "pre_norm", "final_norm")  # fmt: skip
        arguments = _changed(network, base, (*plain, "depth", "num_heads", *flags)) | _vit_parts(network, base)
    ratio = mlp_ratio(network.hidden, network.embed_dim)
    return arguments if ratio == mlp_ratio(base.hidden, base.embed_dim) else arguments | {"mlp_ratio": ratio}


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which timm computes exactly `hidden` units, as int(width * ratio)."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _vit_parts(network: Known, base: Known) -> dict[str, JsonValue]:
    arguments: dict[str, JsonValue] = {}
    if network.layer_scale != base.layer_scale:
        arguments["init_values"] = 1e-5 if network.layer_scale else None
    if network.pos_embed != base.pos_embed:
        arguments["pos_embed"] = "learn" if network.pos_embed else "none"
    if network.act != base.act:
        arguments["act_layer"] = next(name for name, act in ACTIVATIONS.items() if act == network.act)
    if (network.global_pool, network.fc_norm) != (base.global_pool, base.fc_norm):
        arguments["global_pool"] = network.global_pool
        if network.kind == "vit":
            arguments["fc_norm"] = network.fc_norm
    return arguments


def _changed(network: Known, base: Known, names: Sequence[str]) -> dict[str, JsonValue]:
    return {name: _json(getattr(network, name)) for name in names if getattr(network, name) != getattr(base, name)}


def _json(value: Any) -> JsonValue:
    return [_json(part) for part in value] if isinstance(value, tuple) else value
