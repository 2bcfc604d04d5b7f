"""What kind of file or folder a path is, and how its contents are reached."""

from pathlib import Path

from kcrprune.artifact.contents import Contents
from kcrprune.artifact.safetensors_file import read_header


def open_container(path: Path) -> Contents:
    """The contents of a checkpoint; CheckpointError with one sentence for anything that is none."""
    header = read_header(path)
    return Contents(path, (path,), "safetensors file", dict(header.tensors), header.metadata)
