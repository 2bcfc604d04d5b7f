"""Preprocessing and class names come from the checkpoint, else from the registered network, else from flags."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.clues import as_size
from kcrprune.errors import ConfigError
from tests.checkpoints import ways

HF_CONFIG = {
    "hidden_size": 24, "num_attention_heads": 2, "image_size": 32, "layer_norm_eps": 1e-7, "model_type": "vit",
    "id2label": {str(index): name for index, name in enumerate("abcde")},
}  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """A tiny timm ViT, saved bare."""
    save_file(dict(ways.timm_vit()().state_dict()), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def hf_folder(tmp_path):
    """A ViT of Hugging Face with its configuration."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    config.num_labels = 5
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    return tmp_path


def test_registered_preprocessing(weights):
    opened = open_model(weights, num_heads=2, arch="vit_small_patch16_224")
    registered = timm.get_pretrained_cfg("vit_small_patch16_224")
    assert registered is not None
    assert opened.preprocessing.mean == registered.mean == (0.5, 0.5, 0.5)
    assert opened.preprocessing.crop_pct == registered.crop_pct
    assert opened.preprocessing.input_size == (3, 32, 32)
    assert opened.preprocessing.source == "timm's vit_small_patch16_224"


def test_assumed_preprocessing_is_called_so(weights):
    assert "assumed" in open_model(weights, num_heads=2).preprocessing.source


def test_flags_win_and_are_named(weights):
    preprocessing = open_model(weights, num_heads=2, mean=(0.1, 0.2, 0.3), crop_pct=0.9).preprocessing
    assert (preprocessing.mean, preprocessing.crop_pct, preprocessing.std) == ((0.1, 0.2, 0.3), 0.9, (0.5, 0.5, 0.5))
    assert preprocessing.source.startswith("--mean, --crop-pct; else timm's")


@pytest.mark.parametrize(
    "flags",
    [{"mean": (0.5,)}, {"std": (0.5, 0.0, 0.5)}, {"interpolation": "cubic"}, {"crop_pct": 0.0}, {"mean": (1e9, 0, 0)}],
)
def test_flags_that_cannot_work_are_refused(weights, flags):
    with pytest.raises(ConfigError, match=r"cannot work: mean and std need 3 numbers"):
        open_model(weights, num_heads=2, **flags)


def test_timm_config_beside_the_file(weights):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {"num_heads": 2},
        "label_names": list("vwxyz"),
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "interpolation": "bilinear",
            "crop_pct": 0.95,
            "crop_mode": "squash",
        },
    }
    (weights.parent / "config.json").write_text(json.dumps(config))
    opened = open_model(weights)
    assert opened.preprocessing.mean == (0.1, 0.2, 0.3)
    assert (opened.preprocessing.interpolation, opened.preprocessing.crop_mode) == ("bilinear", "squash")
    assert opened.preprocessing.source == "config.json"
    assert opened.class_names == tuple("vwxyz")
    assert open_model(weights.parent).class_names == tuple("vwxyz")


def test_metadata_of_the_file(tmp_path):
    statement = {
        "architecture": "vit_tiny_patch16_224",
        "arguments": {"num_heads": 2},
        "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
        "class_names": list("vwxyz"),
    }
    path = tmp_path / "model.safetensors"
    save_file(dict(ways.timm_vit()().state_dict()), path, {"anything": json.dumps(statement)})
    opened = open_model(path)
    assert (opened.preprocessing.mean, opened.preprocessing.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert opened.class_names == tuple("vwxyz")


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c", "d", 5], "abcde", {"0": "a"}, 7])
def test_labels_that_do_not_fit_the_head_are_left_out(weights, labels):
    config = {"architecture": "vit_tiny_patch16_224", "num_heads": 2, "label_names": labels}
    (weights.parent / "config.json").write_text(json.dumps(config))
    assert open_model(weights).class_names is None


def test_hugging_face_config(hf_folder):
    opened = open_model(hf_folder)
    assert opened.class_names == tuple("abcde")
    assert opened.architecture.norm_eps == 1e-7
    assert opened.model.get_submodule("blocks.0.norm1").eps == 1e-7
    assert opened.model.get_submodule("norm").eps == 1e-7


def test_hugging_face_placeholders_are_no_names(hf_folder):
    labels = {str(index): f"LABEL_{index}" for index in range(5)}
    (hf_folder / "config.json").write_text(json.dumps(HF_CONFIG | {"id2label": labels}))
    assert open_model(hf_folder).class_names is None


def test_hugging_face_config_of_another_network_is_not_believed(hf_folder):
    (hf_folder / "config.json").write_text(json.dumps(HF_CONFIG | {"hidden_size": 48}))
    opened = open_model(hf_folder, num_heads=2)
    assert opened.class_names is None
    assert opened.architecture.norm_eps == 1e-12


@pytest.mark.parametrize(
    ("stated", "crop"),
    [
        ({"size": {"height": 32, "width": 32}}, (1.0, "squash")),
        ({"size": 32, "do_center_crop": False}, (1.0, "squash")),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            (0.8, "center"),
        ),
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (0.8, "center")),
    ],
)
def test_hugging_face_preprocessor(hf_folder, stated, crop):
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_normalize": True}
    (hf_folder / "preprocessor_config.json").write_text(json.dumps(values | stated))
    preprocessing = open_model(hf_folder).preprocessing
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.std == (0.4, 0.5, 0.6)
    assert preprocessing.interpolation == "bilinear"
    assert (preprocessing.crop_pct, preprocessing.crop_mode) == crop
    assert preprocessing.source == "preprocessor_config.json"


def test_options_of_a_training_run_name_the_network(tmp_path):
    args = Namespace(model="vit_tiny_patch16_224.augreg_in21k", model_kwargs={"num_heads": 2}, lr=1.0)
    torch.save({"state_dict": ways.timm_vit()().state_dict(), "args": args}, tmp_path / "checkpoint.pth")
    opened = open_model(tmp_path / "checkpoint.pth")
    assert opened.architecture.name == "vit_tiny_patch16_224"
    assert opened.foreign_names == ("argparse.Namespace",)
    assert "heads 2: the options of the training" in opened.notes


def test_the_moving_average_is_preferred_and_said(tmp_path):
    last, average = ways.timm_vit()().state_dict(), ways.timm_vit()().state_dict()
    average["norm.weight"] = average["norm.weight"] + 1
    torch.save({"state_dict": last, "state_dict_ema": average, "epoch": 1}, tmp_path / "checkpoint.pth")
    opened = open_model(tmp_path / "checkpoint.pth", num_heads=2)
    assert torch.equal(opened.model.state_dict()["norm.weight"], average["norm.weight"])
    assert "weights: state_dict_ema, the moving average (EMA) of a timm training checkpoint" in opened.notes


@pytest.mark.parametrize(
    ("value", "size"),
    [(32, 32), ([32, 32], 32), ((7, 7), 7), ([32, 16], (32, 16)), ([32, 4096], None),
     (0, None), (True, None), (4096, None), ("32", None),
     ([[1], [1]], None), (None, None), ([32.0, 32.0], None)],
)  # fmt: skip
def test_a_files_word_for_a_size(value, size):
    assert as_size(value) == size


def test_half_precision_becomes_single(tmp_path):
    state = {name: value.half() for name, value in ways.timm_vit()().state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    opened = open_model(tmp_path / "half.safetensors", num_heads=2)
    assert {value.dtype for value in opened.model.state_dict().values()} == {torch.float32}
    assert torch.equal(opened.model.state_dict()["norm.weight"].half(), state["norm.weight"])
