"""How images become inputs: whose value is taken, one by one, and what is answered to one that cannot be used."""

from typing import Any

import pytest
import timm

from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.inference import Inferred
from kcrprune.checkpoints.preprocessing import Flags, overridden, preprocessing_of
from kcrprune.errors import CheckpointError, ConfigError
from kcrprune.plan import Architecture, Preprocessing

NAME = "vit_tiny_patch16_224"
SILENT = Flags()


def inferred(name: str = NAME, channels: int = 3, size: Any = 32, *, certain: bool = True) -> Inferred:
    return Inferred(Architecture(family="vit", name=name), channels, size, 16, 5, certain, ())


def found(*said: dict[str, Any], flags: Flags = SILENT, **network: Any) -> Preprocessing:
    clues = tuple(Clues(f"source {number}", preprocessing=values) for number, values in enumerate(said))
    return preprocessing_of(inferred(**network), Evidence(clues), flags)


def test_without_a_word_it_is_that_of_the_registered_network():
    registered: Any = timm.get_pretrained_cfg(NAME)
    plain = found()
    assert (plain.mean, plain.std, plain.interpolation, plain.crop_pct, plain.crop_mode) == (
        *(
            registered.mean,
            registered.std,
            registered.interpolation,
            registered.crop_pct,
            registered.crop_mode or "center",
        ),
    )
    assert (plain.input_size, plain.source) == ((3, 32, 32), f"timm's {NAME}")
    assumed = found(certain=False, size=(64, 16))
    assert assumed.source == f"timm's {NAME}, assumed: the checkpoint does not say"
    assert assumed.input_size == (3, 64, 16)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_than_the_registered_ones_get_the_middle(channels: int):
    grey = found(channels=channels)
    assert (grey.mean, grey.std) == ((0.5,) * channels, (0.5,) * channels)
    assert found(channels=channels, name="no network of timm's") == grey.model_copy(
        update={"source": "timm's no network of timm's", "crop_pct": 1.0}
    )


def test_of_several_sources_each_value_is_the_most_trusted_ones():
    mixed = found({"mean": [0.1] * 3}, {"mean": [0.2] * 3, "crop_pct": 0.5}, {"crop_pct": 0.6, "interpolation": "box"})
    assert (mixed.mean, mixed.crop_pct, mixed.interpolation) == ((0.1,) * 3, 0.5, "box")
    assert mixed.source == "source 0"
    assert found({}, {"crop_mode": "border"}).source == "source 1"
    assert found({}, {"crop_mode": "border"}).crop_mode == "border"
    assert found({"input_size": [3, 224, 224]}).source == f"timm's {NAME}", "which is no preprocessing"


@pytest.mark.parametrize(
    ("key", "value", "usable"),
    [
        ("mean", (0, 1, 0.5), True),
        ("mean", [0.5] * 2, False),
        ("mean", [0.5, 0.5, True], False),
        ("mean", [0.5, 0.5, "0.5"], False),
        ("mean", [0.5, 0.5, 1e4], False),
        ("mean", [0.5, 0.5, -1e4], False),
        ("mean", [0.5, 0.5, 9999], True),
        ("mean", 0.5, False),
        ("mean", [0.5, 0.5, float("nan")], False),
        ("std", [1e-6, 1, 1], True),
        ("std", [9e-7, 1, 1], False),
        ("std", [-1, 1, 1], False),
        ("crop_pct", 0.05, True),
        ("crop_pct", 0.049, False),
        ("crop_pct", 4, True),
        ("crop_pct", 4.01, False),
        ("crop_pct", True, False),
        ("crop_pct", "0.9", False),
        ("interpolation", "hamming", True),
        ("interpolation", "random", False),
        ("interpolation", 3, False),
        ("crop_mode", "squash", True),
        ("crop_mode", "left", False),
    ],
)
def test_a_value_is_used_or_refused_by_name_and_a_flag_decides(key: str, value: Any, usable: bool):
    if usable:
        got = getattr(found({key: value}), key)
        assert got == (tuple(value) if isinstance(value, list | tuple) else value)
        assert not isinstance(value, int | float) or isinstance(got, float)
        return
    way_out = rf"; correct it, or --{key.replace('_', '-')} says it$" if key != "crop_mode" else "; correct it$"
    with pytest.raises(CheckpointError, match=rf"^source 0 states {key} .*, which cannot be used{way_out}"):
        found({key: value})
    said = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "crop_pct": 0.9, "interpolation": "box"}
    if key in said:
        told = found({key: value}, flags=Flags(**{key: said[key]}))
        assert getattr(told, key) == said[key]
        with pytest.raises(CheckpointError):
            found({key: value}, flags=Flags(**{"crop_pct" if key == "mean" else "mean": said["mean"]}))


BASE = Preprocessing(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, source="somebody")


def test_flags_change_what_they_name_and_stand_first_among_the_sources():
    assert overridden(BASE, Flags()) is BASE
    changed = overridden(BASE, Flags(std=(1, 2, 3), crop_pct=0.9))
    assert changed == BASE.model_copy(
        update={"std": (1.0, 2.0, 3.0), "crop_pct": 0.9, "source": "--std, --crop-pct; else somebody"}
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (Flags(mean=(0.5,)), r"^mean \(0\.5,\) cannot work: mean and std need 3 numbers \(std above 0\)"),
        (Flags(std=(0, 1, 1), crop_pct=9), r"^crop_pct 9, std \(0, 1, 1\) cannot work: .*crop_pct 0\.05 to 4, inter"),
        (
            Flags(interpolation="random"),
            r"^interpolation 'random' cannot work: .*interpolation one of nearest, bilinear",
        ),
    ],
)
def test_a_flag_that_cannot_work_is_named_with_what_would(flags: Flags, told: str):
    with pytest.raises(ConfigError, match=told):
        overridden(BASE, flags)
