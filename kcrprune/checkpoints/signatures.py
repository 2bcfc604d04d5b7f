"""Registered networks by their tensors: what a file of registered sizes holds, whatever its family.

The table, signatures.json, has two hashes for a name: one of its tensors, one of all else that decides its outputs.
`python docs/networks.py` writes it from the installed timm.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final, NamedTuple

from torch import nn

from kcrprune.containers.contents import Shape

# a file's has any number of classes, or is missing: what timm calls the last linear of its networks
CLASSIFIER: Final = re.compile(
    r"(head|head_dist|aux_head|classifier)(\.(fc|fc2|linear|proj|classifier|\d+))*\.(weight|bias)$"
)
HEADS: Final = ("head", "head_dist", "aux_head", "classifier")
PREPROCESSING: Final = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Signature(NamedTuple):
    """What tells a registered network; names with equal `tensors` are told apart by a file's own words alone."""

    tensors: str
    behaviour: str


@cache
def table() -> dict[str, Signature]:
    """The signature of every registered network that a family covers, and of those that have the same tensors."""
    rows = json.loads(files("kcrprune.checkpoints").joinpath("signatures.json").read_text("utf-8"))
    return {name: Signature(*row.split()) for name, row in rows.items()}


def is_registered(name: str) -> bool:
    """True for a name in the table."""
    return name in table()


def with_tensors(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The registered networks that have exactly these tensors, with whatever classifier."""
    wanted = tensors(shapes)
    return tuple(name for name, row in table().items() if row.tensors == wanted)


def tensors(shapes: Mapping[str, Shape]) -> str:
    """The hash of a network's tensors by name and shape, without its classifier's."""
    return _hash(sorted((name, list(shape)) for name, shape in shapes.items() if not CLASSIFIER.match(name)))


def behaviour(model: nn.Module) -> str:
    """The hash of what decides a network's outputs beside its tensors: classes, plain attributes, preprocessing."""
    parts = [
        (name, type(module).__name__, _plain(vars(module), vars(module)))
        for name, module in model.named_modules()
        if name.split(".")[0] not in HEADS
    ]
    return _hash([parts, _plain(getattr(model, "pretrained_cfg", {}), PREPROCESSING)])[:8]


def _plain(values: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """The numbers and texts among some values; "none" is what torch's plain GELU says and timm's does not."""
    found = {name: values.get(name) for name in names if name not in ("num_classes", "training")}
    told = {name: value for name, value in found.items() if isinstance(value, int | float | str | tuple)}
    return sorted((name, repr(value)) for name, value in told.items() if value != "none")


def _hash(value: Any) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:16]
