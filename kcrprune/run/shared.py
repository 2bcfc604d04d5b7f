"""What of a run is given to others, and what repeats it: places are the machine's own, and secrets are nobody's."""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from kcrprune.config import RunConfig, load_config
from kcrprune.printable import printable

SECRETS: Final = re.compile(r"(://)[^/@\s]+(?=@)|((?:token|key|secret|password)=)[^&\s']+", re.IGNORECASE)


def without_places(data: Any, words: Mapping[str | Path, str]) -> Any:
    """Plain data in whose texts a word stands for each of these paths, however it is written there.

    A relative one may be a word of a sentence; it is a path where a slash, a colon or nothing follows.
    """
    found = {place: word for path, word in words.items() for place in _written(Path(path))}
    for place in sorted(found, key=lambda place: len(str(place)), reverse=True):
        behind = r"(?![\w.-])" if place.is_absolute() else r"(?=/|:|$)"
        pattern = re.compile(r"(?<![\w./-])" + re.escape(str(place)) + behind)
        data = _replaced(data, pattern, printable(found[place]))
    return data


def repeating(checkpoint: Path, config: RunConfig, out: Path) -> str:
    """The command line that asks for a run again, without what secrets its values may hold."""
    words = ["kcrprune", "compress", str(checkpoint), "--out", str(out)]
    usual = load_config(config.recipe)
    for name, value in config.model_dump(mode="json").items():
        flag = name.replace("_", "-")
        if name == "recipe":
            words += [] if value == "default" else ["--recipe", value]
        elif getattr(usual, name) == getattr(config, name) or value is None:
            continue
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return without_secrets(shlex.join(words))


def without_secrets(text: str) -> str:
    """A text whose passwords, tokens and keys inside addresses are stars."""
    return SECRETS.sub(lambda found: f"{found[1] or found[2]}***", text)


def _written(path: Path) -> Iterable[Path]:
    """The ways to write a path; the root of all, and the folder that one is in, are no names."""
    return (place for place in (path, path.absolute(), path.resolve()) if place.name)


def _replaced(data: Any, place: re.Pattern[str], name: str) -> Any:
    if isinstance(data, dict):
        return {key: _replaced(value, place, name) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_replaced(value, place, name) for value in data]
    return place.sub(lambda _: name, data) if isinstance(data, str) else data
