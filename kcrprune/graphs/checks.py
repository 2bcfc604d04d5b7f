"""What an ONNX file must be before it is believed: a whole graph, its data beside it, images in and logits out.

Every CheckpointError here is a sentence to stand behind the file's name.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from kcrprune.errors import CheckpointError
from kcrprune.graphs import wire
from kcrprune.plan import LARGEST_SIDE, MOST_CHANNELS, Outputs, Preprocessing, sides

LARGEST_FILE = 2**31 - 1  # bytes; protobuf cannot hold more
LARGEST_IMAGE: Final = (MOST_CHANNELS, LARGEST_SIDE, LARGEST_SIDE)
NAMES: Final[dict[Outputs, str]] = {"classes": "logits", "features": "features"}  # of an exported graph's output
FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def parse(path: Path) -> ModelProto:
    """The graph in a file, external data unread."""
    if not path.is_file():
        raise CheckpointError("there is no such file" if not path.exists() else "this is a folder, not an ONNX file")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise CheckpointError(f"the file has {size} bytes; an ONNX file holds at most {LARGEST_FILE}")
    data = path.read_bytes()
    _recognise(data[:512])
    wire.check(data, ModelProto)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise CheckpointError("this is no ONNX graph, or it is damaged or cut short; fetch it again") from error
    if not model.graph.node or not model.ir_version:
        raise CheckpointError("this is no ONNX graph: it holds no operators")
    if any(isinstance(text, bytes) for text in _texts(model)):  # protobuf's way to say that it is not UTF-8
        raise CheckpointError("the graph is damaged: a name in it is no text; fetch it again")
    return model


def _texts(model: ModelProto) -> Iterator[str | bytes]:
    """The names and the metadata that are relied on."""
    graph = model.graph
    yield from (part.name for part in (*graph.initializer, *graph.input, *graph.output))
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)


def _recognise(start: bytes) -> None:
    """Says what a file is that people often have in place of a graph."""
    text = start.lstrip().lower()
    if not text:
        raise CheckpointError("the file is empty; fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError("this is a web page, not an ONNX graph; download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError("this is a git-lfs pointer, not the graph itself; run `git lfs pull`")


def external_bytes(model: ModelProto, folder: Path) -> int:
    """Bytes of data outside the file; each must lie in `folder` or below it, reached through no symbolic link."""
    files = set()
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            files.add(_inside(folder, str(entries.get("location", ""))))
    return sum(file.stat().st_size for file in files)


def _inside(folder: Path, location: str) -> Path:
    file = folder / location
    try:
        direct = "\0" not in location and file.resolve() == file and folder in file.parents
        present = direct and file.is_file()
    except (OSError, RuntimeError):  # a name too long, a loop of links
        direct = present = False
    if not direct:
        raise CheckpointError(
            f"it wants data from {location[:200]!r}; only files in its own folder are read, and not through links"
        )
    if not present:
        raise CheckpointError(f"its data file {location[:200]!r} is missing; put it beside the graph")
    return file


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores, at any depth of its control flow."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _constants(graph.node)
    for function in model.functions:
        yield from _constants(function.node)
        for inner in _bodies(function.node):
            yield from _tensors(ModelProto(graph=inner))


def _constants(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for body in _bodies(graph.node):
        yield from _graphs(body)


def _bodies(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def image_input(graph: GraphProto) -> ValueInfoProto:
    """The only input that is not a weight: floating-point images (batch, channels, height, width)."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name[:40] for value in inputs[:5])
        raise CheckpointError(f"it has {len(inputs)} inputs ({names}); one, the images, is expected")
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in FLOATS or len(kind.shape.dim) != 4:
        raise CheckpointError(
            f"its input {inputs[0].name[:40]!r} is not a floating-point tensor (batch, channels, height, width)"
        )
    return inputs[0]


def input_size(image: ValueInfoProto, img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the input; `img_size` fills in what the graph leaves open."""
    fixed = [dim.dim_value if dim.dim_value > 0 else None for dim in image.type.tensor_type.shape.dim]
    asked = (None, None) if img_size is None else sides(img_size)
    channels, height, width = fixed[1], fixed[2] or asked[0], fixed[3] or asked[1]
    if channels is None or height is None or width is None:
        raise CheckpointError("its input leaves the size of the images open; say it with --img-size")
    size = (channels, height, width)
    if any(asked > largest for asked, largest in zip(size, LARGEST_IMAGE, strict=True)):
        raise CheckpointError(f"its input is {channels} x {height} x {width}, which are no channels, height and width")
    return size


def agree(preprocessing: Preprocessing | None, size: tuple[int, int, int]) -> None:
    """CheckpointError where the metadata prepare images of another size than the graph takes."""
    if preprocessing is not None and preprocessing.input_size != size:
        raise CheckpointError(f"its metadata prepare images of {preprocessing.input_size}, its input takes {size}")


def answers(graph: GraphProto) -> str:
    """The name of the output to read: the only one, one called logits or features, or the only flat one."""
    outputs = list(graph.output)
    flat = [value for value in outputs if len(value.type.tensor_type.shape.dim) == 2]
    called = [[value for value in outputs if value.name == name] for name in NAMES.values()]
    for candidates in (outputs, *called, flat):
        if len(candidates) == 1:
            return candidates[0].name
    names = ", ".join(value.name[:40] for value in outputs[:5])
    raise CheckpointError(f"it has {len(outputs)} outputs ({names}), none of them clearly the logits or the features")
