"""What of a run is given to others: where its files lie is the machine's own, their names are not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kcrprune.printable import printable


def without_places(data: Any, paths: Iterable[str | Path | None]) -> Any:
    """Plain data in whose texts the name of each of these paths stands for the path, where that is absolute."""
    places = {place for path in paths if path for place in _absolute(Path(path))}
    for place in sorted(places, key=lambda place: len(str(place)), reverse=True):
        data = _replaced(data, re.compile(re.escape(str(place)) + r"(?![\w.-])"), printable(place.name))
    return data


def _absolute(path: Path) -> Iterable[Path]:
    """The ways to write a path that tell where it lies; the root of all has no name to stand for it."""
    return (place for place in (path, path.absolute(), path.resolve()) if place.is_absolute() and place.name)


def _replaced(data: Any, place: re.Pattern[str], name: str) -> Any:
    if isinstance(data, dict):
        return {key: _replaced(value, place, name) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_replaced(value, place, name) for value in data]
    return place.sub(lambda _: name, data) if isinstance(data, str) else data
