"""Labels by name: which class of a network the name of a folder means."""

import re
from collections.abc import Collection, Sequence
from typing import Final

from kcrprune.errors import DataError

SHOWN: Final = 5  # names of each side in an error
NUMBER: Final = r"(LABEL_)?\d+"
SYNSET: Final = r"n\d{8}"


def match_classes(found: Collection[str], wanted: Sequence[str], place: str) -> dict[str, int] | None:
    """The index in `wanted` of each name, alike but for case, spaces, hyphens and underscores.

    None where the order alone tells: numbers on either side, and folders named by ImageNet's synsets for a network that
    names its classes in words. DataError with both lists for all other names.
    """
    for key in (str, _loose):
        index = {key(name): number for number, name in enumerate(wanted)}
        matched = {name: index[key(name)] for name in found if key(name) in index}
        if len(index) == len(wanted) and len(matched) == len(found) == len(set(matched.values())):
            return matched
    if _all(NUMBER, found) or _all(NUMBER, wanted) or (_all(SYNSET, found) and not _all(SYNSET, wanted)):
        return None
    raise DataError(
        f"{place} has the classes {_some(found)} and the network {_some(wanted)}; give them equal names, map them with "
        "--class-map, or ignore the labels with --no-labels"
    )


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _all(pattern: str, names: Collection[str]) -> bool:
    return all(re.fullmatch(pattern, name) for name in names)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)})"
