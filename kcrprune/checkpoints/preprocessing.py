"""How images become inputs: from flags, from the checkpoint, or from the network that timm registers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, get_args

import timm

from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.inference import Inferred
from kcrprune.errors import CheckpointError, ConfigError
from kcrprune.plan import LEAST_CROP, MOST_CROP, CropMode, Interpolation, Preprocessing, sides

INTERPOLATIONS, CROP_MODES = get_args(Interpolation), get_args(CropMode)
STATED = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Flags:
    """The user's own words; None where nothing was said."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


def preprocessing_of(inferred: Inferred, evidence: Evidence, flags: Flags) -> Preprocessing:
    """The preprocessing of a dense network, each value from the most trusted source that has it."""
    name, channels = inferred.architecture.name, inferred.in_chans
    registered = timm.get_pretrained_cfg(name)
    values: dict[str, Any] = registered.to_dict() if registered is not None else {}
    sources = [f"timm's {name}" + ("" if inferred.certain else ", assumed: the checkpoint does not say")]
    for clue in reversed(evidence.clues):
        stated = _usable(clue.preprocessing, channels)
        _require_used(clue, stated, flags)
        values |= stated
        sources += [clue.source] if stated else []
    base = Preprocessing(
        input_size=(channels, *sides(inferred.img_size)),
        mean=_channels(values.get("mean"), channels, 0.5),
        std=_channels(values.get("std"), channels, 0.5),
        interpolation=values.get("interpolation") or "bicubic",
        crop_pct=values.get("crop_pct") or 1.0,
        crop_mode=values.get("crop_mode") or "center",
        source=sources[-1],
    )
    return overridden(base, flags)


def _require_used(clue: Clues, usable: Mapping[str, Any], flags: Flags) -> None:
    """CheckpointError for what a file states and cannot be used, where the user says nothing in its place."""
    for key in STATED:
        said = clue.preprocessing.get(key)
        if said is not None and key not in usable and getattr(flags, key, None) is None:
            raise CheckpointError(
                f"{clue.source} states {key} {str(said)[:60]!r}, which cannot be used; correct it"
                + (f", or --{key.replace('_', '-')} says it" if key in Flags.__dataclass_fields__ else "")
            )


def overridden(base: Preprocessing, flags: Flags) -> Preprocessing:
    """`base` with what the user said instead; ConfigError for a value that cannot work."""
    channels = base.input_size[0]
    stated = {key: value for key, value in vars(flags).items() if value is not None}
    if not stated:
        return base
    usable = _usable(stated, channels)
    if wrong := sorted(stated.keys() - usable.keys()):
        values = ", ".join(f"{key} {stated[key]!r}" for key in wrong)
        raise ConfigError(
            f"{values} cannot work: mean and std need {channels} numbers (std above 0), "
            f"crop_pct {LEAST_CROP} to {MOST_CROP:g}, interpolation one of {', '.join(INTERPOLATIONS)}"
        )
    names = ", ".join(f"--{key.replace('_', '-')}" for key in stated)
    return base.model_copy(update={**usable, "source": f"{names}; else {base.source}"})


def _usable(stated: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The values that make sense, under their names."""
    usable: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = stated.get(key)
        if _is_row(value, channels) and not (key == "std" and min(value) < 1e-6):
            usable[key] = tuple(float(number) for number in value)
    if stated.get("interpolation") in INTERPOLATIONS:
        usable["interpolation"] = stated["interpolation"]
    if stated.get("crop_mode") in CROP_MODES:
        usable["crop_mode"] = stated["crop_mode"]
    crop_pct = stated.get("crop_pct")
    if _is_number(crop_pct) and LEAST_CROP <= crop_pct <= MOST_CROP:
        usable["crop_pct"] = float(crop_pct)
    return usable


def _is_row(value: Any, channels: int) -> TypeGuard[Sequence[float]]:
    return isinstance(value, list | tuple) and len(value) == channels and all(_is_number(number) for number in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e4 < value < 1e4


def _channels(value: Any, channels: int, default: float) -> tuple[float, ...]:
    """The registered mean or std for a network of any number of channels."""
    if isinstance(value, list | tuple) and len(value) == channels:
        return tuple(float(number) for number in value)
    return (default,) * channels
