"""What the outputs are: classes or features, by the file's last layer, names and words."""

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.checkpoints.dense import open_dense
from kcrprune.checkpoints.outputs import projections
from kcrprune.errors import ConfigError
from kcrprune.plan import Preprocessing
from tests.checkpoints.foreign import FOREIGN
from tests.tiny import Tiny

CLIP: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


def named(folder, name: str, width: int, labels: list[str] | None = None):
    """A tiny network under a registered name, in timm's folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=width, **CLIP)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": {"num_heads": 2}, "label_names": labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("label", ["Hugging Face CLIP", "OpenCLIP", "Hugging Face ViT", "DINO", "timm Swin"])
def test_a_layout_says_what_its_last_layer_is(label: str, tmp_path):
    foreign = next(foreign for foreign in FOREIGN if foreign.label == label)
    opened = open_model(foreign.save(foreign.model(), tmp_path), **foreign.options)
    expected = {"Hugging Face CLIP": (0, 5), "OpenCLIP": (0, 5), "DINO": (0, 24)}.get(label, (5, 0))
    assert (opened.class_count, opened.feature_count) == expected
    assert opened.outputs == ("classes" if expected[0] else "features")
    assert any("embedding of 5 channels" in note for note in opened.notes) == (expected[1] == 5)


@pytest.mark.parametrize(
    ("name", "width", "labels", "outputs"),
    [
        ("vit_base_patch32_clip_224", 512, None, "features"),  # OpenAI's weights under timm's names
        ("vit_base_patch32_clip_224", 512, [f"class {i}" for i in range(512)], "classes"),  # trained on
        ("vit_base_patch32_clip_224", 7, None, "classes"),
        ("vit_base_patch16_224", 512, None, "classes"),
    ],
)
def test_a_registered_name_and_a_width_say_it_unless_classes_are_named(name, width, labels, outputs, tmp_path):
    opened = open_model(named(tmp_path, name, width, labels))
    assert opened.outputs == outputs
    assert opened.class_names == (labels and tuple(labels))


def test_the_user_decides(tmp_path):
    folder = named(tmp_path, "vit_base_patch32_clip_224", 512)
    assert open_model(folder, outputs="classes").class_count == 512
    opened = open_model(named(tmp_path, "vit_base_patch16_224", 3, list("abc")), outputs="features")
    assert (opened.feature_count, opened.class_names) == (3, None)
    assert "outputs are features: as asked" in opened.notes


def test_classes_cannot_be_asked_of_a_network_without_a_last_layer(tmp_path):
    folder = named(tmp_path, "vit_base_patch32_clip_224", 0)
    with pytest.raises(ConfigError, match="has no classifier"):
        open_dense(folder, outputs="classes")


def test_weights_that_were_trained_on_classes_are_no_projections():
    assert projections("vit_base_patch16_clip_224") == {512}  # and not 1000, 11821
    assert projections("vit_pe_core_large_patch14_336") == {1024}
    assert projections("swin_tiny_patch4_window7_224") == set()


@pytest.mark.parametrize("outputs", ["classes", "features", None])
def test_an_artifact_remembers_it_and_one_of_before_is_asked_its_last_layer(outputs, tiny_vit: Tiny, tmp_path):
    path = tmp_path / "x.safetensors"
    preprocessing = Preprocessing(input_size=tiny_vit.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(
        path,
        tiny_vit.model(),
        architecture=tiny_vit.architecture,
        plan=None,
        preprocessing=preprocessing,
        class_names=tuple("abcde"),
        record={},
        outputs=outputs,
    )
    opened = open_model(path)
    assert opened.outputs == (outputs or "classes")
    assert opened.class_names == (None if outputs == "features" else tuple("abcde"))
    assert open_model(path, outputs="features").outputs == "features"
