"""A cut network at another image size is the dense one at that size, cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.artifact.artifact import Contract, _sized, open_model, save_model
from kcrprune.errors import ConfigError
from kcrprune.plan import Architecture, ChannelPlan, Preprocessing
from kcrprune.surgery.narrow import cut_
from tests.tiny import TINY, Tiny, random_plan, relative_error

SIZES = {28: (42, (28, 42)), 32: (64, (32, 48)), 56: (112, (56, 112))}  # by a tiny network's own


def stored(path: Path, tiny: Tiny, model: nn.Module, plan: ChannelPlan | None) -> Path:
    save_model(
        path,
        model,
        architecture=tiny.architecture,
        plan=plan,
        preprocessing=Preprocessing(input_size=tiny.input_size, mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=tuple("abcde"),
        record={"dense_digest": "x", "dense_macs": 7},
    )
    return path


@torch.no_grad()
@pytest.mark.parametrize("tiny", [tiny for tiny in TINY if tiny.label != "hybrid"], ids=lambda tiny: tiny.label)
def test_cutting_and_resizing_commute(tiny: Tiny, tmp_path: Path):
    model, plan = tiny.model(), random_plan(tiny.model(), tiny.architecture.name, seed=1)
    dense = stored(tmp_path / "dense.safetensors", tiny, model, None)
    pruned = stored(tmp_path / "pruned.safetensors", tiny, cut_(tiny.model(), plan), plan)
    for size in SIZES[tiny.input_size[1]]:
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(2, 3, height, width)
        opened = open_model(pruned, img_size=size)
        resized = cut_(open_model(dense, img_size=size).model, plan)
        assert relative_error(opened.model(images), resized(images)) <= 1e-6
        assert opened.preprocessing.input_size == (3, height, width)
        assert opened.record == {"dense_digest": "x"}, "figures are of the other size"


def test_the_own_size_changes_nothing_and_others_must_fit_the_patches(tiny_vit: Tiny, tmp_path: Path):
    path = stored(tmp_path / "dense.safetensors", tiny_vit, tiny_vit.model(), None)
    assert open_model(path, img_size=32).record == open_model(path).record
    with pytest.raises(ConfigError, match="--img-size 40,32 is no multiple of the patch size 16"):
        open_model(path, img_size=(40, 32))


class Fixed(nn.Module):
    """Of a class that is built for images of a size, and tells no patches."""

    def __init__(self, img_size: int = 32) -> None:
        super().__init__()


class Free(nn.Module):
    """Of one that takes images of any size."""


def contract() -> Contract:
    return Contract(
        format=2,
        architecture=Architecture(family="x", name="x"),
        plan=None,
        preprocessing=Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=None,
        content_hash="",
        record={"config": {}, "dense_digest": "d", "dense_macs": 7, "kernel": None},
    )


def test_a_network_that_is_built_for_a_size_and_tells_no_patches_keeps_it():
    for same in (None, 32, (32, 32)):
        assert _sized(contract(), same, Fixed()) == (contract(), ())
    with pytest.raises(ConfigError, match="--img-size 64,32: a Fixed keeps the size that it was cut at"):
        _sized(contract(), (64, 32), Fixed())


@pytest.mark.parametrize(("size", "sides"), [(64, (64, 64)), ((32, 48), (32, 48)), ((7, 9), (7, 9))])
def test_a_network_of_any_size_needs_no_argument_and_leaves_its_figures(size: Any, sides: tuple[int, int]):
    found, notes = _sized(contract(), size, Free())
    assert found.architecture.arguments == {}
    assert found.preprocessing.input_size == (3, *sides)
    assert found.record == {"config": {}, "dense_digest": "d"}
    assert len(notes) == 1
