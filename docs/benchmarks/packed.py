"""The pretrained networks and CIFAR-10 images in a folder of small pieces, for a machine that fetches nothing.

A piece is a folder of its own below the one that is named. What is large is cut into chunks NAME.0, NAME.1, ... and put
together again with its checksum, so a machine that has got the first pieces alone has what lies in them.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import fetch
import int8_networks
import numpy as np
from PIL import Image
from safetensors.numpy import load, save

CONTENTS: Final = "contents.json"
SIDE: Final = 32  # of an image
COLUMNS: Final = 100  # images in a row of the picture that holds them
PARTS: Final[tuple[str, str]] = ("train", "validation")


class MissingError(Exception):
    """A piece is not there, or not whole."""


def pack(folder: Path, cache: Path, networks: Sequence[str], counts: tuple[int, int], piece: int) -> None:
    """Writes the first images of each part of CIFAR-10 and then the networks, `piece` bytes a piece at most."""
    names = [name for part, count in zip(PARTS, counts, strict=True) for name in _first(cache, part, count)]
    labels = [fetch.CLASSES.index(path.parent.name) for path in names]
    told: dict[str, Any] = {"counts": counts, "labels": labels, "sha256": {}, "bytes": {}}
    written = 0
    for name in ("images", *networks):
        content = _picture(names) if name == "images" else huffman(save(int8_networks.lifted(name, cache)))
        told["sha256"][name], told["bytes"][name] = hashlib.sha256(content).hexdigest(), len(content)
        start = 0
        while start < len(content):
            end = min(len(content), start + piece - written % piece)
            place = folder / str(written // piece) / f"{name}.{start}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content[start:end])
            written, start = written + end - start, end
    (folder / "0" / CONTENTS).write_text(json.dumps(told))


def contents(folder: Path) -> dict[str, Any]:
    """What `pack` told."""
    return json.loads((folder / "0" / CONTENTS).read_text())


def images(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 32, 32, 3) of each part and their labels (n,)."""
    told = contents(folder)
    picture = np.asarray(Image.open(io.BytesIO(_joined(folder, "images"))).convert("RGB"))
    rows = picture.reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    labels, first, total = np.array(told["labels"]), told["counts"][0], sum(told["counts"])
    return dict(zip(PARTS, ((rows[:first], labels[:first]), (rows[first:total], labels[first:])), strict=True))


def network(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Tensors in float32 by Hugging Face's names; MissingError where a piece of them is missing."""
    return int8_networks.dequantised(load(zlib.decompress(_joined(folder, name))))


def _joined(folder: Path, name: str) -> bytes:
    chunks = sorted(folder.glob(f"*/{name}.*"), key=lambda path: int(path.suffix[1:]))
    content = b"".join(path.read_bytes() for path in chunks)
    told = contents(folder)
    if hashlib.sha256(content).hexdigest() != told["sha256"].get(name):
        raise MissingError(f"{name}: {len(content):,} of {told['bytes'].get(name, 0):,} bytes are there")
    return content


def huffman(content: bytes) -> bytes:
    """Weights compressed: nothing repeats, so only frequent values become short."""
    made = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return made.compress(content) + made.flush()


def _first(cache: Path, part: str, count: int) -> list[Path]:
    return sorted((fetch.cifar10(cache) / part).glob("*/*.png"), key=lambda path: path.name)[:count]


def _picture(names: Sequence[Path]) -> bytes:
    """One lossless picture of all images, row by row."""
    rows = -(-len(names) // COLUMNS)
    pixels = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)
    for place, name in zip(pixels, names, strict=False):
        place[:] = np.asarray(Image.open(name).convert("RGB"))
    sheet = pixels.reshape(rows, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    stream = io.BytesIO()
    picture = Image.fromarray(sheet.reshape(rows * SIDE, COLUMNS * SIDE, 3))
    picture.save(stream, "webp", lossless=True, quality=80, method=3)
    return stream.getvalue()
