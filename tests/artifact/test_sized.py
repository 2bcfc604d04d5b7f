"""A cut network at another image size is the dense one at that size, cut."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.errors import ConfigError
from kcrprune.plan import ChannelPlan, Preprocessing
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
