"""JSON that strangers wrote, read within limits."""

import json
from pathlib import Path
from typing import Any

from kcrprune.errors import CheckpointError

LARGEST = 8 * 2**20  # ours; ImageNet-21k's id2label takes 1 MB, the plan of a giant ViT 2 MB


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; CheckpointError, naming `what`, for anything else."""
    try:
        parsed = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(f"{what} nests too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return parsed


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    size = path.stat().st_size
    if size > LARGEST:
        raise CheckpointError(f"{path} is {size} bytes long, too much for a configuration")
    return parse_object(path.read_bytes(), str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
