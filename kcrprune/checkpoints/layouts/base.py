"""The contract of a layout: one way in which somebody names the tensors of a ViT or a Swin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kcrprune.checkpoints.clues import Clues
from kcrprune.containers.contents import Shape

Shapes = Mapping[str, Shape]
Tensors = dict[str, Tensor]


def as_they_are(tensors: Tensors) -> Tensors:
    """The names are timm's already."""
    return tensors


def says_nothing(config: Mapping[str, Any], shapes: Shapes) -> Clues:
    """No clue beside the shapes."""
    return Clues()


@dataclass(frozen=True)
class Layout:
    """Somebody's names.

    `anchor` is the name of the patch embedding's weight: whatever stands before it in a file is a prefix. Where it is
    '', whatever stands before many tensors may be one.
    `matches` sees the shapes by name, without the prefix; the first layout of the table that matches is taken.
    `convert` brings the tensors to timm's names, or to older names that timm's own conversion knows.
    `clues` reads the library's configuration (the config.json beside the file, or {}), and states its defaults.
    `outside` are names that this layout keeps outside the prefix, such as a classifier beside a backbone.
    `dropped` are prefixes of tensors that belong to training and not to the network; `remark` is told to people.
    `doubt` is why the file is refused where no name that timm knows says how its tensors are used, nor `settled_by`:
    the "wrapper" that its authors publish it in, or one of timm's arguments that the file states.
    `projects` says that a last layer is a projection into an embedding that images share with texts, and no classifier.
    """

    name: str
    anchor: str
    matches: Callable[[Shapes], bool]
    convert: Callable[[Tensors], Tensors] = as_they_are
    clues: Callable[[Mapping[str, Any], Shapes], Clues] = says_nothing
    outside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    remark: str = ""
    doubt: str = ""
    settled_by: str = ""
    projects: bool = False
