"""What a checkpoint says about its network beside the shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import JsonValue

from kcrprune.plan import LARGEST_SIDE, as_sides

# timm's arguments that shapes cannot tell; everything else is measured, so a file's word for it is not needed
BELIEVED: Final = frozenset({"num_heads", "global_pool", "img_size", "window_size", "act_layer"})

ASKED: Final = "as asked"  # the source of what the user said


@dataclass(frozen=True)
class Clues:
    """One source's statements; `source` is how people are told where they come from.

    `arguments` are timm's, restricted to BELIEVED and checked against the shapes; `preprocessing` has timm's names.
    """

    source: str = ""
    name: str | None = None
    arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    norm_eps: float | None = None
    preprocessing: Mapping[str, JsonValue] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    resembles: str = ""  # how the name begins, where several networks fit
    usual_size: JsonValue = None  # input of the network as registered, which may not be this one's
    called: str = ""  # its name, where timm has none like it


@dataclass(frozen=True)
class Evidence:
    """All clues of a checkpoint, most trusted first."""

    clues: tuple[Clues, ...] = ()
    asked_size: int | tuple[int, int] | None = None  # the user's own word for the image

    @property
    def usual_size(self) -> JsonValue:
        """The input of the network as registered, where a file tells it."""
        return next((clue.usual_size for clue in self.clues if clue.usual_size is not None), None)

    def argument(self, name: str) -> tuple[JsonValue, str]:
        """The most trusted value of a timm argument with its source; (None, "") where nobody says."""
        for clue in self.clues:
            if name in clue.arguments:
                return clue.arguments[name], clue.source
        return None, ""

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """What the network is called, with the sources."""
        return tuple((clue.name, clue.source) for clue in self.clues if clue.name)

    @property
    def called(self) -> str:
        """What the file calls the network though timm has no such name, with the source; "" where it does not."""
        return next((f"{clue.source}: {clue.called}" for clue in self.clues if clue.called), "")

    @property
    def resembles(self) -> tuple[str, ...]:
        """Beginnings of names, for the choice between networks that fit equally."""
        return tuple(clue.resembles for clue in self.clues if clue.resembles)

    @property
    def norm_eps(self) -> tuple[float | None, str]:
        """The layer norms' epsilon with its source."""
        found = ((clue.norm_eps, clue.source) for clue in self.clues if clue.norm_eps is not None)
        return next(found, (None, ""))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the head's outputs."""
        return next((clue.class_names for clue in self.clues if clue.class_names), None)


def believed(arguments: Any) -> dict[str, JsonValue]:
    """The part of somebody's keyword arguments that is used."""
    if not isinstance(arguments, Mapping):
        return {}
    return {key: value for key, value in arguments.items() if key in BELIEVED and value is not None}


def as_number(value: Any) -> int | None:
    """A number from 1 to LARGEST_SIDE as itself, None for anything else."""
    return value if type(value) is int and 0 < value <= LARGEST_SIDE else None


def as_size(value: Any) -> int | tuple[int, int] | None:
    """An image's size: a side from 1 to LARGEST_SIDE, or (height, width) where they differ; None for anything else."""
    if not isinstance(value, list | tuple):
        return as_number(value)
    if len(value) != 2 or None in map(as_number, value):
        return None
    return as_sides(value)


def as_text(value: Any) -> str | None:
    """A short text without terminal codes as itself, None for anything else."""
    return value if isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() else None


def as_names(value: Any, count: int) -> tuple[str, ...] | None:
    """`count` class names in order, from a list or from a table by index (Hugging Face's id2label)."""
    if isinstance(value, Mapping):
        value = [value.get(str(index), value.get(index)) for index in range(min(count, len(value)))]
    if not isinstance(value, list | tuple) or len(value) != count or not all(map(as_text, value)):
        return None
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(value))  # transformers' placeholder
    return None if unnamed else tuple(value)
