"""The image that a network was made for, of one side or two: what its tables hold, held to what is said about it.

Sizes are pixels, one number for a square or (height, width); a grid is (rows, columns) of patches.
"""

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any

from kcrprune.checkpoints.clues import Evidence, as_size
from kcrprune.containers.contents import Shape
from kcrprune.errors import CheckpointError, UnsupportedModelError
from kcrprune.plan import sides, size_text

Size = int | tuple[int, int]
Pair = tuple[int, int]


def stated_size(evidence: Evidence) -> tuple[Size | None, str]:
    """The image size that the file states, and where; CheckpointError for one that cannot be."""
    said, source = evidence.argument("img_size")
    size = as_size(said)
    if said is not None and size is None:
        raise CheckpointError(f"{source} states the image size {str(said)[:40]!r}, which cannot be; --img-size says it")
    return size, source


def grid_of(size: Size, patch: int) -> Pair:
    """Rows and columns of patches; what is left of the image at the border counts as no patch."""
    height, width = sides(size)
    return height // patch, width // patch


def table_size(positions: int, prefixes: Sequence[int], patch: int, evidence: Evidence) -> tuple[Size, int]:
    """The size whose patches a table of `positions` entries holds, and how many of them are prefix tokens.

    `prefixes` are the numbers of prefix tokens that the table may have, likely ones first. A table is a square where
    nobody says otherwise.
    """
    size, source = stated_size(evidence)
    candidates = (size, as_size(evidence.usual_size), evidence.asked_size)
    for said in (candidate for candidate in candidates if candidate is not None):
        for prefix in prefixes:
            if prod(grid_of(said, patch)) == positions - prefix:
                return said, prefix
    if size is not None:
        raise CheckpointError(
            f"{source} states images of {size_text(size)} pixels, which are {prod(grid_of(size, patch))} patches of "
            f"{patch}, and the position table holds {positions} entries; --img-size H,W says the size it was made for"
        )
    for prefix in prefixes:
        side = isqrt(max(positions - prefix, 0))
        if side > 0 and side * side == positions - prefix:
            return side * patch, prefix
    raise UnsupportedModelError(
        f"the position table holds {positions} entries, which is no square image of patches; --img-size H,W says the "
        "height and width that it was made for"
    )


def windowed_size(
    shapes: Mapping[str, Shape], patch: int, entries: Sequence[int], evidence: Evidence
) -> tuple[Size, Any]:
    """The image of a Swin with tables of so many `entries` by stage, and timm's argument for its windows.

    Where nobody says it, it is the smallest whose last stage is one window. CheckpointError for a size that the tables
    contradict, UnsupportedModelError for tables that are no square windows where nobody says the size.
    """
    size, source = stated_size(evidence)
    if size is not None:
        return size, _required(size, patch, entries, source)
    smallest = _smallest(patch, entries)
    last = smallest or evidence.asked_size  # square windows open in any image, and are resized to what is asked
    for said in (_masked_size(shapes, patch, entries[0]), as_size(evidence.usual_size), last):
        if said is not None and (found := _windows(said, patch, entries)) is not None:
            return said, found
    raise UnsupportedModelError(
        f"its stages have {', '.join(map(str, entries))} relative positions, which are no square windows; --img-size "
        "H,W says the height and width that they were made for"
    )


def _required(size: Size, patch: int, entries: Sequence[int], source: str) -> Any:
    found = _windows(size, patch, entries)
    if found is None:
        raise CheckpointError(
            f"{source} states images of {size_text(size)} pixels, and its stages have {', '.join(map(str, entries))} "
            "relative positions, which are no windows of such an image"
        )
    return found


def _windows(size: Size, patch: int, entries: Sequence[int]) -> Any:
    """The `window_size` of timm that makes tables of so many entries of an image, None where there is none.

    timm shrinks a stage's window to the stage's grid where the grid is smaller, and so do the tables in the file.
    """
    height, width = grid_of(size, patch)
    grids = [(-(-height // 2**stage), -(-width // 2**stage)) for stage in range(len(entries))]
    for window in range(1, max(max(grid) for grid in grids) + 1):
        if all(_entries(_shrunk(window, grid)) == count for grid, count in zip(grids, entries, strict=True)):
            return window
    found = [_window_of(count, grid) for grid, count in zip(grids, entries, strict=True)]
    if None in found:
        return None
    squares = [pair[0] for pair in found if pair is not None and pair[0] == pair[1]]
    return tuple(squares if len(squares) == len(found) != 2 else found)  # timm takes two numbers for height and width


def _shrunk(window: int, grid: Pair) -> Pair:
    return min(window, grid[0]), min(window, grid[1])


def _entries(window: Pair) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _window_of(entries: int, grid: Pair) -> Pair | None:
    """The window of a table on a grid: the square one, or the only one of two sides."""
    fitting = [
        (rows, (entries // (2 * rows - 1) + 1) // 2)
        for rows in range(1, grid[0] + 1)
        if entries % (2 * rows - 1) == 0 and entries // (2 * rows - 1) % 2 == 1
    ]
    fitting = [pair for pair in fitting if pair[1] <= grid[1]]
    square = [pair for pair in fitting if pair[0] == pair[1]]
    return square[0] if square else fitting[0] if len(fitting) == 1 else None


def _smallest(patch: int, entries: Sequence[int]) -> int | None:
    """The smallest square image whose last stage is one window, where all windows are squares."""
    if not all(isqrt(count) ** 2 == count and count % 2 for count in entries):
        return None
    return patch * (isqrt(entries[-1]) + 1) // 2 * 2 ** (len(entries) - 1)


def _masked_size(shapes: Mapping[str, Shape], patch: int, entries: int) -> int | None:
    """The image size that an official file's attention mask (windows, T, T) was made for."""
    mask = shapes.get("layers.0.blocks.1.attn_mask", (0,))[0]
    side = isqrt(mask)
    return patch * (isqrt(entries) + 1) // 2 * side if mask and side * side == mask else None
