"""How people write the values of settings: numbers with bounds, shares, times, widths by axis (no torch)."""

from math import inf, nan
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from kcrprune.plan import AXES, Axis

MOST: Final = 2**31 - 1  # of whatever is counted; libraries fail beyond what their indices hold
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]


def as_share(value: Any) -> Any:
    """A percentage as a share of 1; anything else as it is."""
    if not isinstance(value, str):
        return value
    number, percent, rest = value.partition("%")
    try:
        return float(number) / (100 if percent else 1) if not rest.strip() else value
    except ValueError:
        raise ValueError("it is written as a share, such as 0.7 or 70%") from None


Share = Annotated[float, BeforeValidator(as_share), Field(gt=0, le=1)]
ShareOrNone = Annotated[float, BeforeValidator(as_share), Field(ge=0, le=1)]


def _as_latency(value: Any) -> Any:
    """A share of the dense time below 1, or a text that ends in ms; None as it is."""
    if value is None:
        return None
    number, unit, rest = str(value).strip().partition("ms")
    try:
        found = float(number) if unit else float(as_share(value))
    except (TypeError, ValueError):
        found = nan
    if rest or not 0 < found < (inf if unit else 1):
        raise ValueError("it is written as a share of the dense time below 1, such as 0.7 or 70%, or as 5ms")
    return f"{found:.12g}ms" if unit else found


Latency = Annotated[float | str | None, BeforeValidator(_as_latency)]


def _as_widths(value: Any) -> Any:
    """Widths by axis where a text or a table names axes; anything else as it is."""
    if isinstance(value, str) and "=" in value:
        pairs = [pair.partition("=") for pair in value.split(",")]
        value = {axis.strip(): width.strip() for axis, _, width in pairs}
    if isinstance(value, dict):
        for axis, width in value.items():
            if axis not in AXES:
                raise ValueError(f"there is no axis {axis!r}, these are: {', '.join(AXES)}")
            if not str(width).isdecimal() or not int(width):
                raise ValueError(f"{axis} = {width!r} is no width")
    return value


RoundTo = Annotated[PositiveInt | dict[Axis, PositiveInt], BeforeValidator(_as_widths)]
