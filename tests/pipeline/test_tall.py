"""Images of two sides all the way: from a bare checkpoint to a verified graph that is evaluated on images."""

import json

import pytest
import torch
from PIL import Image

from kcrprune.artifact.artifact import open_model
from kcrprune.cli.app import run
from kcrprune.graphs import open_onnx
from tests.checkpoints import ways

QUICK = [
    *["--generated-images", "24", "--calibration-images", "16", "--score-images", "8", "--batch-size", "8"],
    *[
        "--search-steps",
        "0",
        "--recover-steps",
        "1",
        "--warmup-steps",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--round-to",
        "2",
        "-q",
    ],
]


@pytest.mark.parametrize(
    ("make", "size", "heads"),
    [
        (ways.timm_vit(img_size=(64, 16), patch_size=4), (64, 16), ["--num-heads", "2"]),
        (ways.timm_swin(img_size=(32, 16), depths=(1, 1)), (32, 16), []),
    ],
    ids=["vit", "swin"],
)
def test_a_tall_network_is_cut_exported_and_evaluated(tmp_path, monkeypatch, capsys, make, size, heads):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dense = make().eval()
    torch.save(dense.state_dict(), "tall.pth")
    for label in range(5):
        folder = tmp_path / "photos" / "validation" / str(label)
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (20, 90), (50 * label, 90 * index, 0)).save(folder / f"{index}.png")

    asked = ["--img-size", f"{size[0]},{size[1]}", *heads]
    assert run(["inspect", "tall.pth", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preprocessing"]["input_size"] == [3, *size]

    assert run(["compress", "tall.pth", *asked, "--target-flops", "0.8", "--out", "run", *QUICK]) == 0
    pruned = open_model(tmp_path / "run")
    assert pruned.preprocessing.input_size == (3, *size)
    assert (tmp_path / "run" / "config.toml").read_text().splitlines().count("img_size = [") == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["before"]["macs"] == found["macs"]

    assert run(["export", "run", "--onnx", "tall.onnx", "-q"]) == 0
    graph = open_onnx(tmp_path / "tall.onnx")
    images = torch.randn(3, 3, *size)
    torch.testing.assert_close(graph(images), pruned.model(images), rtol=1e-4, atol=1e-4)
    assert graph.macs == graph.counted_macs

    capsys.readouterr()
    shares = []
    for model in ("run", "tall.onnx"):
        assert run(["evaluate", model, "--data", "photos", "--workers", "0", "--device", "cpu", "--json"]) == 0
        shares.append(json.loads(capsys.readouterr().out))
    assert shares[0]["images"] == shares[1]["images"] == 10
    assert shares[0]["top1"] == shares[1]["top1"]
