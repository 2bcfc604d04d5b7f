"""Where a checkpoint's statements about its network are found, beside its shapes."""

import json
from collections.abc import Mapping
from typing import Any, Final

import timm

from kcrprune.checkpoints.clues import Clues, as_names, as_size, as_text, believed
from kcrprune.checkpoints.locate import Located
from kcrprune.checkpoints.registry import bare_name
from kcrprune.containers.contents import Contents
from kcrprune.containers.modules import attributes, is_module, parts
from kcrprune.containers.pickled_calls import Stub

# where training code keeps its options, and what it calls the network
OPTIONS: Final = ("args", "hyper_parameters", "config", "cfg", "opt", "hparams")
NAMES: Final = ("model", "arch", "architecture", "model_name", "backbone", "variant")
FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def stated(contents: Contents, located: Located, classes: int) -> tuple[Clues, ...]:
    """What a file states, most trusted first; `classes` is the number of outputs of its head."""
    found = [from_module(module) for module in [_at(contents.tree, located.trail)] if is_module(module)]
    found += [from_timm(statement, source, classes) for source, statement in _statements(contents)]
    found += [from_options(contents.tree)] if isinstance(contents.tree, Mapping) else []
    found += [from_preprocessor(contents.preprocessor)] if contents.preprocessor else []
    found.append(Clues(resembles=contents.path.name.split(".")[0].split("-")[0]))
    if located.trail == ("model",) and len(contents.tree) == 1:  # how DeiT's authors publish
        found.append(Clues(resembles="deit"))
    return tuple(found)


def from_module(module: Stub) -> Clues:
    """What the attributes of a pickled network say that its shapes do not."""
    arguments: dict[str, Any] = {}
    epsilons: list[float] = []
    heads: set[int] = set()
    for name, part, _ in parts(module):
        held = attributes(part)
        if "decoder" in name:  # of a self-supervised network
            continue
        heads |= {held[key] for key in ("num_heads", "num_attention_heads") if type(held.get(key)) is int}
        if part.name.endswith(".LayerNorm") and isinstance(held.get("eps"), float):
            epsilons.append(held["eps"])
        if as_text(held.get("global_pool")):
            arguments.setdefault("global_pool", held["global_pool"])
        if name.endswith(("patch_embed.", "patch_embeddings.")):
            arguments.setdefault("img_size", held.get("img_size") or held.get("image_size"))
    if len(heads) == 1:
        arguments["num_heads"] = heads.pop()
    norm_eps = epsilons[0] if len(set(epsilons)) == 1 else None
    return Clues(source="the pickled module", arguments=believed(arguments), norm_eps=norm_eps)


def from_timm(statement: Mapping[str, Any], source: str, classes: int) -> Clues:
    """The clues of a configuration with timm's names: `architecture`, `model_args`, `pretrained_cfg`, labels.

    `arguments`, `preprocessing` and `class_names` are accepted as well for the last three.
    """
    pretrained = statement.get("pretrained_cfg") or statement.get("preprocessing") or {}
    pretrained = pretrained if isinstance(pretrained, Mapping) else {}
    arguments = believed(statement) | believed(statement.get("model_args") or statement.get("arguments"))
    labels = statement.get("label_names") or statement.get("class_names") or pretrained.get("label_names")
    name = as_text(statement.get("architecture")) or as_text(statement.get("arch"))
    return Clues(
        source=source,
        **_name(name),
        arguments=arguments,
        usual_size=_input_sides(pretrained),
        preprocessing=pretrained,
        class_names=as_names(labels, classes),
    )


def from_options(tree: Mapping[str, Any]) -> Clues:
    """The clues among the options that training code stores beside the weights: a name that timm knows, a size."""
    source = "the options of the training"
    tables = [_table(tree.get(key)) for key in OPTIONS]
    called = ""
    for table in (*tables, tree):
        texts = [text for key in NAMES if (text := as_text(table.get(key)))]
        if name := next((bare_name(text) for text in texts if timm.is_model(bare_name(text))), None):
            arguments = {"img_size": _input_sides(table)} | believed(table) | believed(table.get("model_kwargs"))
            return Clues(source=source, name=name, arguments=believed(arguments))
        called = called or next(iter(texts), "")
    return Clues(source=source, called=called)


def _input_sides(stated: Mapping[str, Any]) -> Any:
    """Height and width of an input_size (channels, height, width)."""
    size = stated.get("input_size")
    return list(size[1:]) if isinstance(size, list | tuple) and len(size) == 3 else None


def _name(text: str | None) -> dict[str, Any]:
    """A network's name as a clue; one that timm does not know is told, and decides nothing."""
    return {"name" if text is None or timm.is_model(bare_name(text)) else "called": text}


def from_preprocessor(stated: Mapping[str, Any]) -> Clues:
    """The clues of Hugging Face's preprocessor_config.json."""
    values: dict[str, Any] = {"mean": stated.get("image_mean"), "std": stated.get("image_std")}
    if stated.get("do_normalize") is False:
        values = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    resample = stated.get("resample")
    values["interpolation"] = FILTERS.get(resample) if type(resample) is int else None
    resized, cropped = _side(stated.get("size")), _side(stated.get("crop_size"))
    if stated.get("do_center_crop") and resized and cropped:
        values["crop_pct"] = cropped / resized
    elif resized:  # height and width are resized to at once, whatever the image's shape
        values |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return Clues(source="preprocessor_config.json", preprocessing=values)


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    found = as_size(size)
    return min(found) if isinstance(found, tuple) else found


def _at(tree: Any, trail: tuple[str, ...]) -> Any:
    for key in trail:
        tree = tree[key]
    return tree


def _table(options: Any) -> Mapping[str, Any]:
    """Options as a table; a Namespace is a stub with its attributes."""
    if isinstance(options, Stub):
        return attributes(options) or options.entries
    return options if isinstance(options, Mapping) else {}


def _statements(contents: Contents) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    flat: dict[str, Any] = {}
    for key, text in contents.metadata.items():
        value = _json_or_text(text)
        if isinstance(value, dict) and "architecture" in value:
            found.append((f"the file's metadata ({key})", value))
        else:
            flat[key] = value
    if "architecture" in flat or "num_heads" in flat:
        found.append(("the file's metadata", flat))
    if "architecture" in contents.config:
        found.append(("config.json", contents.config))
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
