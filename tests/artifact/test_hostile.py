"""What an artifact states of itself has the bounds of the user's own flags, and is that of its network."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.errors import CheckpointError
from kcrprune.plan import Preprocessing


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact of a tiny ViT with five classes, and its metadata."""
    from tests.tiny import TINY

    path, tiny = tmp_path_factory.mktemp("artifact") / "m.safetensors", TINY[0]
    preprocessing = Preprocessing(input_size=tiny.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(
        path,
        tiny.model(),
        architecture=tiny.architecture,
        plan=None,
        preprocessing=preprocessing,
        class_names=tuple("abcde"),
        record={"dense_macs": 7, "seen": "by a newer one"},
    )
    with safe_open(path, "pt") as file:
        return path, json.loads(file.metadata()["kcrprune"])


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("record", {"dense_macs": "abc"}),
        ("record", {"dense_macs": 10**400}),
        ("record", {"dense_macs": 0}),
        ("record", {"kernel": [1]}),
        ("record", {"accuracy": {"images": -1}}),
        ("preprocessing", {"input_size": [3, 30000, 30000]}),
        ("preprocessing", {"input_size": [3, 64, 32]}),  # honest sizes, of another network
        ("preprocessing", {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}),
        ("preprocessing", {"crop_pct": 1e-3}),
        ("preprocessing", {"std": [0, 0, 0]}),
        ("preprocessing", {"mean": [0.5]}),
        ("preprocessing", {"interpolation": "evil"}),
        ("preprocessing", {"crop_mode": "\x1b[31m"}),
        ("architecture", {"arguments": {"img_size": [32, 1 << 40]}}),
    ],
)
def test_metadata_are_bounded(artifact, tmp_path, where, what):
    path, metadata = artifact
    changed = metadata | {where: metadata[where] | what}
    save_file(load_file(path), tmp_path / "m.safetensors", {"kcrprune": json.dumps(changed)})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        open_model(tmp_path / "m.safetensors")


def test_names_of_other_classes_are_refused(artifact, tmp_path):
    path, metadata = artifact
    save_file(load_file(path), tmp_path / "m.safetensors", {"kcrprune": json.dumps(metadata | {"class_names": ["a"]})})
    with pytest.raises(CheckpointError, match="names 1 classes, its network has 5"):
        open_model(tmp_path / "m.safetensors")


def test_what_a_newer_one_records_is_no_fault(artifact):
    assert open_model(artifact[0]).record == {"dense_macs": 7, "seen": "by a newer one"}
