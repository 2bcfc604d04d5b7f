"""Writes what kcrprune knows of timm's networks, from the installed timm: `python docs/networks.py`.

Every network that timm registers is built on the meta device, which takes no memory and some minutes. Those that a
family covers are written to kcrprune/checkpoints/signatures.json with all that have the same tensors, and those of
registry.MODULES to registry.json.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
from torch import nn

from kcrprune.checkpoints import registry, signatures
from kcrprune.checkpoints.registry import Known
from kcrprune.checkpoints.signatures import Signature
from kcrprune.containers.contents import shapes_of
from kcrprune.errors import UnsupportedModelError
from kcrprune.families import family_of

TABLES = Path(__file__).parents[1] / "kcrprune" / "checkpoints"


def networks() -> Iterator[tuple[str, nn.Module]]:
    """Every network that timm registers and can build without memory."""
    for name in timm.list_models():
        try:
            yield name, timm.create_model(name, device="meta")
        except (NotImplementedError, RuntimeError, ValueError):  # it computes with its weights while it is built
            continue


def is_covered(model: nn.Module) -> bool:
    """True where a family can cut the network."""
    try:
        family_of(model)
    except UnsupportedModelError:
        return False
    return True


def signature_of(model: nn.Module) -> Signature:
    """The signature of a registered network."""
    return Signature(signatures.tensors(shapes_of(model.state_dict())), signatures.behaviour(model))


def row_of(name: str, model: nn.Module) -> dict[str, Any]:
    """The sizes and traits of a registered network that are not the usual ones."""
    usual = {field.name: field.default for field in fields(Known)}
    return {key: value for key, value in asdict(registry.describe(name, model)).items() if value != usual[key]}


def tables() -> dict[str, str]:
    """The text of each table by its file's name."""
    ordered = [name for module in registry.MODULES for name in timm.list_models(module=module)]
    rows, found, covered = {}, {}, set()
    for name, model in networks():
        found[name] = signature_of(model)
        if is_covered(model):
            covered.add(found[name].tensors)
            if name in ordered and registry.is_plain(model):
                rows[name] = json.dumps(row_of(name, model))
    kept = {name: " ".join(signature) for name, signature in found.items() if signature.tensors in covered}
    return {
        "registry.json": "[\n" + ",\n".join(rows[name] for name in ordered if name in rows) + "\n]\n",
        "signatures.json": json.dumps(kept, indent=0) + "\n",
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # timm's own, to developers
    for file, text in tables().items():
        (TABLES / file).write_text(text, encoding="utf-8")
