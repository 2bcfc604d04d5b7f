"""Tables of text for people: numbers with their units, and Markdown."""

import re
from dataclasses import dataclass
from html import escape

from kcrprune.printable import printable

ABSENT = "-"


@dataclass(frozen=True)
class Table:
    """A titled table; every row is as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def markdown(table: Table) -> str:
    """The table as Markdown, its first column left-aligned and the others right-aligned."""
    rule = (":--", *["--:"] * (len(table.header) - 1))
    lines = [_line(table.header), f"|{'|'.join(rule)}|", *map(_line, table.rows)]
    return "\n".join([f"## {escaped(table.title)}", "", *lines])


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


def escaped(text: str) -> str:
    """`text` on one line, safe between two bars, and read by Markdown and HTML as nothing but text."""
    plain = escape(printable(" ".join(text.split())), quote=False)
    return re.sub(r"([\\|`\[\]])", r"\\\1", plain)


def code(text: str) -> str:
    """`text` as code within a line, whatever backticks it holds."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if ticks == "`" else f"{ticks} {text} {ticks}"


def count(number: float) -> str:
    """A quantity with a decimal prefix: 9,876, then 22.05 M, 4.60 G."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if prefix == 'k' else size):.2f} {prefix}"
    return f"{number:,.0f}"


def file_size(number: float) -> str:
    """Bytes as 88.27 MB."""
    return f"{count(number)}{'B' if number >= 1e4 else ' B'}"


def percent(share: float) -> str:
    """A share of 1 as 84.65 %."""
    return f"{100 * share:.2f} %"


def figure(number: float) -> str:
    """Four significant digits."""
    return f"{number:.4g}"


def milliseconds(number: float) -> str:
    """A time in ms."""
    return f"{number:.1f} ms"


def duration(seconds: float) -> str:
    """A time as 8.3 s, 2 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
