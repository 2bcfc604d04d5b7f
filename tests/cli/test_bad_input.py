"""Bad input through the real pipeline: one sentence with the way out, the documented exit code, nothing written."""

import shutil

import pytest
import timm
import torch
from PIL import Image

from kcrprune.artifact.artifact import save_model
from kcrprune.cli.app import run
from kcrprune.plan import Preprocessing

QUICK = [
    *["--generated-images", "24", "--calibration-images", "8", "--score-images", "8", "--batch-size", "4"],
    *["--search-steps", "2", "--recover-steps", "2", "--warmup-steps", "1", "--workers", "0", "--device", "cpu"],
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dense(here, tiny_vit):
    """A dense checkpoint of a tiny ViT with five classes."""
    preprocessing = Preprocessing(input_size=tiny_vit.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(
        here / "dense.safetensors",
        tiny_vit.model(),
        architecture=tiny_vit.architecture,
        plan=None,
        preprocessing=preprocessing,
        class_names=None,
        record={},
    )
    return here / "dense.safetensors"


def image_folder(root, classes):
    for split in ("train", "validation"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (40 * label, 60 * number, 0)).save(folder / f"{number}.png")
    return root


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(here, capsys):
    """Runs a command that must fail, and returns its sentence."""

    def check(*words, code):
        before = tree(here)
        assert run([str(word) for word in words]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        [sentence] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert printed.err.endswith(f"{sentence}\n")
        assert "unexpected" not in sentence
        assert tree(here) == before, "something was written"
        return sentence

    return check


@pytest.mark.parametrize("command", ["compress", "report", "export", "inspect"])
def test_a_missing_file(refused, command):
    assert "none.pth" in refused(command, "none.pth", code=3)


@pytest.mark.parametrize("command", ["compress", "report", "export", "inspect"])
def test_a_truncated_file(refused, dense, command):
    dense.write_bytes(dense.read_bytes()[:-100])
    assert "dense.safetensors" in refused(command, dense, code=3)


@pytest.mark.parametrize("command", ["compress", "report", "export", "inspect"])
@pytest.mark.parametrize("name", ["swin_t.pth", "swin_t.safetensors"])
def test_a_web_page_in_place_of_a_file(refused, here, command, name):
    (here / name).write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    assert name in refused(command, name, code=3)


def test_a_web_page_in_place_of_a_graph(refused, here):
    (here / "m.onnx").write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    assert "m.onnx" in refused("report", "m.onnx", code=3)


def test_a_folder_without_a_model(refused, here):
    (here / "empty").mkdir()
    assert "empty" in refused("report", "empty", code=3)


def test_the_wrong_number_of_classes(refused, dense, here):
    image_folder(here / "photos", classes=3)
    sentence = refused("compress", dense, "--data", "photos", *QUICK, code=5)
    assert "3" in sentence
    assert "5" in sentence


@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_an_empty_data_folder(refused, dense, here, command):
    (here / "photos").mkdir()
    words = QUICK if command == "compress" else ["--workers", "0"]
    assert "photos" in refused(command, dense, "--data", "photos", *words, code=5)


def test_a_data_folder_that_is_not_there(refused, dense):
    assert "photos" in refused("compress", dense, "--data", "photos", *QUICK, code=5)


@pytest.mark.parametrize("name", ["missing.txt", "a\0b"])
def test_a_class_map_that_is_not_there_though_nothing_needs_it(refused, dense, name):
    assert "name a class map that is there" in refused("compress", dense, "--class-map", name, *QUICK, code=5)


def test_an_unreachable_target_names_the_floor(refused, dense):
    sentence = refused("compress", dense, "--target-flops", "0.7", "--axes", "attn_value", *QUICK, code=6)
    assert "0.7" in sentence
    assert "mlp_hidden" in sentence  # an axis that would help


def test_an_unknown_network(refused, here):
    torch.save(timm.create_model("test_resnet.r160_in1k", pretrained=False).state_dict(), here / "resnet.pth")
    refused("compress", "resnet.pth", *QUICK, code=4)


def test_an_unknown_architecture_name(refused, here, tiny_vit):
    torch.save(tiny_vit.model().state_dict(), here / "vit.pth")
    assert "vit_tiny_patch99" in refused("inspect", "vit.pth", "--arch", "vit_tiny_patch99", code=2)


def test_a_run_folder_that_is_taken(refused, dense, here):
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("mine")
    assert "--out" in refused("compress", dense, "--out", "run", *QUICK, code=9)


def test_an_export_that_is_taken(refused, dense, here):
    (here / "m.onnx").write_bytes(b"mine")
    assert "m.onnx" in refused("export", dense, "--onnx", "m.onnx", code=9)


def test_an_export_without_any_run(refused):
    assert "compress first" in refused("export", code=3)


def test_an_evaluation_without_images(refused, dense):
    assert "--data" in refused("evaluate", dense, code=2)


def test_a_target_that_a_run_has_reached_is_refused(refused, dense, here, capsys):
    assert run(["compress", str(dense), "--out", "run", *QUICK, "-q"]) == 0
    capsys.readouterr()
    shutil.rmtree(here / "kcrprune-runs", ignore_errors=True)
    assert "keeps 0.6" in refused("compress", "run", *QUICK, code=6)
