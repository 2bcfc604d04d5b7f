"""Turns what was opened or measured into reports."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.graphs import OnnxModel, open_onnx
from kcrprune.measure.activations import peak_activation_bytes
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.measure.report import Accuracy, KernelFigures, ModelReport, block_widths
from kcrprune.method.kernel_complexity import Covariance, kernel_complexity, rank_for, tails
from kcrprune.surgery.narrow import full_plan
from kcrprune.training.evaluate import Evaluation


def kernel_figures(covariance: Covariance, rank_share: float) -> KernelFigures:
    """KC and its relatives of the features that a covariance has seen."""
    spectrum = covariance.spectrum()
    found = kernel_complexity(spectrum, covariance.images)
    rank = rank_for(rank_share, covariance.images, covariance.total.shape[0])
    tnn = float(tails(spectrum)[rank])
    return KernelFigures(
        kc=found.kc,
        h=found.h,
        tnn=tnn,
        kc_normalised=found.kc_normalised,
        tnn_relative=min(1.0, tnn / found.trace) if found.trace else 0.0,
        effective_rank=found.effective_rank,
        rank=rank,
        images=found.images,
    )


def accuracy_of(evaluation: Evaluation) -> Accuracy:
    """An evaluation as a report's figures."""
    return Accuracy.model_validate(asdict(evaluation))


def report_of(
    opened: Opened,
    *,
    kernel: KernelFigures | None = None,
    accuracy: Accuracy | None = None,
    dense_macs: int | None = None,
) -> ModelReport:
    """The figures of an opened network; those that are not given are what an artifact states of itself, if it does."""
    measured: dict[str, Any] = {"kernel": kernel, "accuracy": accuracy, "dense_macs": dense_macs}
    stated = {name: opened.record[name] for name in measured if measured[name] is None and opened.record.get(name)}
    plan = opened.plan or full_plan(opened.model, opened.architecture.name)
    return ModelReport(
        source=opened.source,
        layout=opened.layout,
        state="dense" if opened.plan is None else "pruned",
        architecture=opened.architecture.name,
        family=opened.architecture.family,
        input_size=opened.preprocessing.input_size,
        outputs=opened.outputs,
        parameters=count_parameters(opened.model),
        macs=count_macs(opened.model, opened.preprocessing.input_size),
        activation_bytes=peak_activation_bytes(opened.model, opened.preprocessing.input_size),
        file_bytes=opened.file_bytes,
        blocks=block_widths(plan),
        notes=opened.notes,
        stated=tuple(stated),
        **(measured | stated),
    )


def file_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def open_any(path: Path, network: Mapping[str, Any]) -> Opened | OnnxModel:
    """Any checkpoint, artifact, run folder or ONNX file; `network` says how a checkpoint is read."""
    return open_onnx(path) if path.suffix == ".onnx" else open_model(path, **network)


def report_of_any(opened: Opened | OnnxModel) -> ModelReport:
    """The figures of whatever was opened."""
    return report_of_graph(opened) if isinstance(opened, OnnxModel) else report_of(opened)


def report_of_graph(graph: OnnxModel) -> ModelReport:
    """The figures of an ONNX file: what it says of itself, else what its operators tell."""
    record = graph.record
    stated = [name for name in ("parameters", "macs", "dense_macs") if getattr(record, name) is not None]
    return ModelReport(
        source=str(graph.path),
        layout="ONNX",
        state="onnx",
        architecture=record.architecture,
        family=record.family,
        input_size=graph.input_size,
        outputs=graph.outputs,
        parameters=graph.parameters,
        macs=graph.macs,
        dense_macs=record.dense_macs,
        file_bytes=graph.file_bytes,
        blocks=record.blocks or (),
        stated=(*stated, "blocks") if record.blocks else tuple(stated),
    )
