"""Export to ONNX: one file, any batch size, compared with PyTorch in ONNX Runtime before it takes its name."""

import io
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto
from torch import nn

from kcrprune.atomic import taken, write_atomically
from kcrprune.errors import CheckpointError, ConfigError, ExportError, OutputExistsError
from kcrprune.events import Listener, StageEnded, StageStarted, StepDone, ignore
from kcrprune.graphs.checks import LARGEST_FILE, NAMES
from kcrprune.graphs.open import OnnxModel, open_onnx
from kcrprune.plan import Outputs
from kcrprune.version import __version__

INPUT = "images"
OPSETS = range(17, 24)  # those that PyTorch writes these networks in
EXAMPLE_BATCH = 2  # the exporter takes a batch of one for a constant
# Largest difference allowed, in standard deviations of the outputs. Ours: float32 networks of 0.03 to 86 M parameters,
# random and trained, dense and cut, were measured at 6e-6 and below; one weight off by 1e-3 lies far above.
TOLERANCE = 1e-4
ROOM = 2**24  # bytes left for what is not weights
SOURCE_PATHS = "pkg.torch."  # the exporter's own metadata, where the paths of source files stand


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how near ONNX Runtime comes to PyTorch."""

    path: Path
    batch_sizes: tuple[int, ...]  # compared
    max_abs_diff: float  # of an output
    max_rel_diff: float  # the same in standard deviations of the outputs
    tolerance: float  # what max_abs_diff was allowed to be
    nodes: int
    bytes: int
    opset: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """How far two networks are apart, and how far apart they may be."""

    largest: float
    deviation: float  # standard deviation of the outputs

    @property
    def tolerance(self) -> float:
        """The largest difference that counts as equal."""
        return TOLERANCE * self.deviation

    @property
    def relative(self) -> float:
        """In standard deviations of the outputs; 0 where nothing differs."""
        return self.largest / self.deviation if self.largest else 0.0


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    input_size: tuple[int, int, int],
    metadata: Mapping[str, str],
    outputs: Outputs = "classes",
    batch_sizes: Sequence[int] = (1, 2, 5),
    opset: int = 20,
    seed: int = 0,
    listener: Listener = ignore,
) -> ExportResult:
    """Writes a network, its weights included, as one ONNX file; the model is left as it is.

    The input is called images, the output logits or features.

    ConfigError for an opset that is not in OPSETS; OutputExistsError where the path is taken; ExportError, and no file,
    where the graph cannot be made or does not compute what the model does on random images of every size in
    `batch_sizes`.
    """
    path, start = Path(path), time.perf_counter()
    if path.exists() or path.is_symlink():
        raise OutputExistsError(taken(path))
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset} cannot be written; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    _check_size(model)
    network = deepcopy(model).to("cpu", torch.float32).eval()
    listener(StageStarted("export"))
    data = _serialised(_tidy_(_graph_of(network, input_size, NAMES[outputs], opset), metadata))
    verified: list[tuple[OnnxModel, Difference]] = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        try:
            graph = open_onnx(temporary)
            verified.append((graph, _compare(network, graph, batch_sizes, seed, listener)))
        except CheckpointError as error:
            raise ExportError(f"the exported graph does not work, nothing was written: {error}") from error

    write_atomically(path, write, needed=len(data))
    graph, difference = verified[0]
    seconds = time.perf_counter() - start
    listener(StageEnded("export", seconds))
    return ExportResult(
        path=path,
        batch_sizes=tuple(batch_sizes),
        max_abs_diff=difference.largest,
        max_rel_diff=difference.relative,
        tolerance=difference.tolerance,
        nodes=graph.nodes,
        bytes=len(data),
        opset=graph.opset,
        seconds=seconds,
    )


def _check_size(model: nn.Module) -> None:
    values = [*model.parameters(), *model.buffers()]
    size = sum(value.numel() * (4 if value.is_floating_point() else value.element_size()) for value in values)
    if size > LARGEST_FILE - ROOM:
        raise ExportError(
            f"the weights take {size / 1e9:.2f} GB in float32, and one ONNX file holds at most 2.14 GB; "
            f"cut the network further or choose a smaller one"
        )


def _graph_of(network: nn.Module, input_size: tuple[int, int, int], output: str, opset: int) -> ModelProto:
    """The traced graph, its batch dimension free."""
    example = torch.zeros(EXAMPLE_BATCH, *input_size)
    try:
        with _silence():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except (RuntimeError, ValueError) as error:  # torch.onnx.OnnxExporterError is the first
        raise ExportError(f"PyTorch cannot export this {type(network).__name__}: {_reason(error)}") from error
    assert program is not None, "dynamo=True returns a program"
    model = program.model_proto
    written = [entry.version for entry in model.opset_import if not entry.domain]
    if written != [opset]:  # the exporter falls back in silence
        raise ExportError(f"this PyTorch cannot write opset {opset}, it wrote {written[0]}; choose that one")
    return model


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause; what the exporter wraps around it is advice for its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints its progress and warns of its own deprecations; what fails is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _tidy_(model: ModelProto, metadata: Mapping[str, str]) -> ModelProto:
    """Takes the exporting machine out of a graph, puts our metadata in, and asks for the oldest IR of its opset."""
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.producer_name, model.producer_version, model.doc_string = "kcrprune", __version__, ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    _tidy_graph_(model.graph)
    return model


def _tidy_graph_(graph: GraphProto) -> None:
    graph.doc_string = ""
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        kept = [entry for entry in part.metadata_props if not entry.key.startswith(SOURCE_PATHS)]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)
        part.doc_string = ""
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type == AttributeProto.GRAPH:
            _tidy_graph_(attribute.g)


def _serialised(model: ModelProto) -> bytes:
    try:
        return model.SerializeToString(deterministic=True)
    except ValueError as error:  # protobuf's own limit, which constants that the exporter unrolled may pass
        raise ExportError(f"the graph does not fit into one ONNX file of 2.14 GB: {error}") from error


@torch.no_grad()
def _compare(
    network: nn.Module, graph: OnnxModel, batch_sizes: Sequence[int], seed: int, listener: Listener
) -> Difference:
    """The difference over random normalised images; ExportError where it is above the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    expected, actual = [], []
    for step, batch in enumerate(batch_sizes, start=1):
        images = torch.randn(batch, *graph.input_size, generator=generator)
        expected.append(network(images))
        actual.append(graph(images))
        if actual[-1].shape != expected[-1].shape:
            shapes = f"{tuple(actual[-1].shape)}, the model {tuple(expected[-1].shape)}"
            raise ExportError(f"the exported graph gives outputs of shape {shapes}; nothing was written")
        listener(StepDone("export", step, {"batch": batch}))
    reference = torch.cat(expected)
    largest = float((torch.cat(actual) - reference).abs().max())
    difference = Difference(largest, float(reference.std(correction=0)))
    if not difference.largest <= difference.tolerance:  # also where one of them is not a number
        raise ExportError(
            f"the exported graph does not compute what the model does and was not kept: outputs differ by "
            f"{difference.largest:.2e}, allowed are {difference.tolerance:.2e} ({TOLERANCE:g} standard deviations)"
        )
    return difference
