"""Paths that are no checkpoint end in one sentence; folders and shards open, and lead nowhere else."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model
from kcrprune.containers.container import open_container
from kcrprune.errors import CheckpointError, UnsupportedModelError
from tests.checkpoints import ways


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(ways.timm_vit()().state_dict())


MISTAKEN = {
    "page.pth": (b"\n <!DOCTYPE html><html>", "is a web page"),
    "page2.pth": (b"<html><head>", "is a web page"),
    "feed.pth": (b"<?xml version='1.0'?><Error>", "is an XML text"),
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "empty.pth": (b"", "is empty"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "packed.pth": (b"\x1f\x8b\x08", "gzip; unpack it first"),
    "array.npy": (b"\x93NUMPY\x01", "numpy array"),
    "augreg.npz": (b"PK\x03\x04", r"JAX, Flax.*checkpoint_path=FILE.*torch.save"),
    "__0_0.distcp": (b"PK\x03\x04", "name its folder"),
    "llama.gguf": (b"GGUF\x03", "GGUF"),
    "config.json": (b'{"a": 1}', "is a JSON text and no weights"),
    "graph.onnx": (b"\x08\x0a\x12\x07", "is an ONNX graph"),
    "noise.pth": (b"\x07\x13 something else entirely", "neither safetensors nor PyTorch"),
    "old.tar": (b"\0" * 257 + b"ustar", "tar archive"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_mistaken_file_is_one_sentence(tmp_path, name):
    data, sentence = MISTAKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_model(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_distributed_checkpoint_is_to_be_joined(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"PK")
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError, match=r"format_utils dcp_to_torch .* model.pth"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224 fetches"),
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k fetches"),
        ("google/vit-base-patch16-224", "hf-hub:google/vit-base-patch16-224 fetches"),
        ("hf-hub:CLIP-ViT-B", r"hf-hub:ORG/NAME\[@REVISION\]"),
        ("models/vit.pth", "does not exist, nor does the folder models"),
        ("vit.pth", "vit.pth does not exist"),
    ],
)
def test_a_name_in_place_of_a_file_is_answered_with_the_way_to_it(tmp_path, monkeypatch, name, way):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=way):
        open_model(Path(name))


def test_missing_paths(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_model(tmp_path)


def test_a_folder_of_one_file_is_that_file(tmp_path):
    save_file(state(), tmp_path / "anything.safetensors")
    assert open_model(tmp_path, num_heads=2).layout == "timm ViT, safetensors file"


def test_a_folder_of_several_files_asks_which(tmp_path):
    torch.save(state(), tmp_path / "epoch1.pth")
    torch.save(state(), tmp_path / "epoch2.pth")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(epoch1\.pth, epoch2\.pth\); name one"):
        open_model(tmp_path)


def shards(folder, place="part-{}.safetensors"):
    """Two shards and their index; the index names the files as `place` says."""
    weights, index = state(), {}
    for part in range(2):
        names = [name for number, name in enumerate(weights) if number % 2 == part]
        save_file({name: weights[name] for name in names}, folder / f"part-{part}.safetensors")
        index |= dict.fromkeys(names, place.format(part))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    opened = open_model(shards(tmp_path), num_heads=2)
    assert opened.layout == "timm ViT, 2 shards"
    assert torch.equal(opened.model.state_dict()["blocks.1.mlp.fc1.weight"], state()["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("place", ["../other/part-{}.safetensors", "{}.safetensors", "/etc/passwd", "..", "a\0b"])
def test_shards_elsewhere_are_not_followed(tmp_path, place):
    (tmp_path / "other").mkdir()
    (tmp_path / "home").mkdir()
    shards(tmp_path / "other")
    shards(tmp_path / "home", place)
    with pytest.raises(CheckpointError, match=r"outside the folder|lacks the shard|no name of a file"):
        open_container(tmp_path / "home")


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "home").mkdir()
    shards(tmp_path / "secret")
    shards(tmp_path / "home")
    linked = tmp_path / "home" / "part-0.safetensors"
    linked.unlink()
    linked.symlink_to(tmp_path / "secret" / "part-0.safetensors")
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        open_container(tmp_path / "home")


def test_links_inside_the_folder_of_a_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shards(snapshot)
    for part in range(2):
        file = snapshot / f"part-{part}.safetensors"
        file.rename(blobs / f"hash{part}")
        file.symlink_to(f"../../blobs/hash{part}")
    assert len(open_container(snapshot).files) == 2


@pytest.mark.parametrize(
    "change", [{}, {"weight_map": 3}, {"weight_map": {"w": 3}}, {"weight_map": {"w": "part-0.safetensors"}}]
)
def test_a_false_index_is_refused(tmp_path, change):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=r"no index of shards|and it does not"):
        open_container(tmp_path)


def test_the_digest_is_that_of_the_file(tmp_path):
    from hashlib import sha256

    path = tmp_path / "weights.safetensors"
    save_file(state(), path)
    assert open_model(path, num_heads=2).digest == sha256(path.read_bytes()).hexdigest()


TINY = {"img_size": 32, "num_classes": 3}
REFUSED = {
    "eva02_tiny_patch14_224": ({"img_size": 28, "num_classes": 3}, "EVA"),
    "eva02_base_patch14_224": (TINY | {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}, "SwiGLU"),
    "vit_small_patch16_rope_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "rotary"),
    "vit_small_patch16_rope_ape_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "rotary"),
    "beit_base_patch16_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "BEiT"),
    "swinv2_tiny_window8_256":
        (TINY | {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "window_size": 4}, "SwinV2"),
    "convnext_atto": ({"num_classes": 3, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "convolutional"),
    "resnet18": ({"num_classes": 3}, "convolutional"),
    "cait_xxs24_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "CaiT"),
    "vit_giant_patch14_dinov2": ({"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}, "SwiGLU"),
    "vit_small_patch16_18x2_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "parallel"),
    "vit_relpos_small_patch16_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "relative positions"),
    "hiera_tiny_224": ({"num_classes": 3, "embed_dim": 8, "stages": (1, 1, 1, 1)}, "Hiera"),
    "aimv2_large_patch14_224": ({"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}, "SwiGLU"),
    "vit_small_resnet26d_224": (TINY | {"depth": 1, "embed_dim": 24, "num_heads": 2}, "hybrid"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(tmp_path, name):
    arguments, reason = REFUSED[name]
    torch.save(timm.create_model(name, **arguments).state_dict(), tmp_path / "file.pth")
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        open_model(tmp_path / "file.pth", num_heads=2)
    assert "file.pth" in str(caught.value)


def test_a_config_that_names_what_cannot_be_cut_is_believed(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_rope_ape_224"}))
    with pytest.raises(UnsupportedModelError, match="rope_ape_224 has parts that cannot be told from shapes"):
        open_model(tmp_path, num_heads=2)
    assert open_model(tmp_path, num_heads=2, arch="vit_tiny_patch16_224")


def test_unknown_weights_are_named(tmp_path):
    torch.save({f"layer{index}.weight": torch.zeros(2, 2) for index in range(9)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"with 9 tensors \(layer0\.weight, .*but no ViT or Swin"):
        open_model(tmp_path / "file.pth")
