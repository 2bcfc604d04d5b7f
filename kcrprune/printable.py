"""Strangers' text for people: it may hold anything, also the codes that terminals obey."""

import json
import re


def printable(text: str, most: int | None = None) -> str:
    """A text, or its first `most` characters, on one line; an escape stands for every character that is not shown."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text[:most])


def printable_lines(text: str) -> str:
    """A text of several lines, each `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """JSON whose texts have JSON's own escapes for every character that is not shown."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
