"""Where a checkpoint's statements about its network are found: its metadata and the JSON beside it."""

import json
from collections.abc import Mapping
from typing import Any

from kcrprune.artifact.clues import Clues, as_names, as_size, as_text, believed
from kcrprune.artifact.contents import Contents


def stated(contents: Contents, classes: int) -> tuple[Clues, ...]:
    """The clues of a file that follow timm's conventions, most trusted first. `classes`: outputs of its head."""
    found = []
    for source, statement in _statements(contents):
        found.append(from_timm(statement, source, classes))
    return tuple(found)


def from_timm(statement: Mapping[str, Any], source: str, classes: int) -> Clues:
    """The clues of a configuration with timm's names: `architecture`, `model_args`, `pretrained_cfg`, labels.

    `arguments`, `preprocessing` and `class_names` are accepted as well for the last three.
    """
    pretrained = statement.get("pretrained_cfg") or statement.get("preprocessing") or {}
    pretrained = pretrained if isinstance(pretrained, Mapping) else {}
    arguments = statement.get("model_args") or statement.get("arguments") or {}
    arguments = believed(statement) | believed(arguments)
    input_size = pretrained.get("input_size")
    if "img_size" not in arguments and isinstance(input_size, list) and len(input_size) == 3:
        arguments["img_size"] = as_size(input_size[1:])
    labels = statement.get("label_names") or statement.get("class_names") or pretrained.get("label_names")
    name = as_text(statement.get("architecture")) or as_text(statement.get("arch"))
    return Clues(
        source=source,
        name=name,
        arguments=believed(arguments),
        preprocessing=pretrained,
        class_names=as_names(labels, classes),
    )


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
