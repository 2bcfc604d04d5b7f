"""Turns what was opened or measured into reports."""

from pathlib import Path

import torch
from torch import nn

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.families import classifiers
from kcrprune.graphs import OnnxModel, open_onnx
from kcrprune.measure.latency import latency_ms
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.measure.report import Accuracy, KernelFigures, ModelReport, block_widths
from kcrprune.method.kernel_complexity import Covariance, kernel_complexity, rank_for, tails
from kcrprune.surgery.narrow import full_plan
from kcrprune.training.evaluate import Evaluation


def class_count(model: nn.Module) -> int:
    """Number of classes, 0 for a bare backbone."""
    heads = classifiers(model)
    return heads[0].out_features if heads else 0


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
    return Accuracy(
        images=evaluation.images,
        top1=evaluation.top1,
        top5=evaluation.top5,
        loss=evaluation.loss,
        agreement=evaluation.agreement,
    )


def report_of(opened: Opened, *, kernel: KernelFigures | None = None, accuracy: Accuracy | None = None) -> ModelReport:
    """The figures of an opened network; kernel figures default to those that an artifact carries."""
    record = opened.record
    if kernel is None and record.get("kernel"):
        kernel = KernelFigures.model_validate(record["kernel"])
    if accuracy is None and record.get("accuracy"):
        accuracy = Accuracy.model_validate(record["accuracy"])
    plan = opened.plan or full_plan(opened.model, opened.architecture.name)
    return ModelReport(
        source=str(opened.path),
        layout=opened.layout,
        state="dense" if opened.plan is None else "pruned",
        architecture=opened.architecture.name,
        family=opened.architecture.family,
        input_size=opened.preprocessing.input_size,
        parameters=count_parameters(opened.model),
        macs=count_macs(opened.model, opened.preprocessing.input_size),
        dense_macs=record.get("dense_macs"),
        file_bytes=file_bytes(opened.path),
        blocks=block_widths(plan),
        kernel=kernel,
        accuracy=accuracy,
        notes=opened.notes,
    )


def file_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def report_path(path: Path, *, latency: bool = False) -> ModelReport:
    """The report of any checkpoint, artifact, run folder or ONNX file."""
    if path.suffix == ".onnx":
        graph = open_onnx(path)
        report, call = report_of_graph(graph), graph
    else:
        opened = open_model(path)
        report, call = report_of(opened), opened.model
    if latency:
        with torch.inference_mode():
            milliseconds = latency_ms(call, torch.zeros(1, *report.input_size))
        report = report.model_copy(update={"latency_ms": milliseconds, "latency_batch": 1})
    return report


def report_of_graph(graph: OnnxModel) -> ModelReport:
    """The figures of an ONNX file: what it says of itself, else what its operators tell."""
    record = graph.record
    return ModelReport(
        source=str(graph.path),
        layout="ONNX",
        state="onnx",
        architecture=record.architecture,
        family=record.family,
        input_size=graph.input_size,
        parameters=graph.parameters,
        macs=graph.macs,
        dense_macs=record.dense_macs,
        file_bytes=graph.file_bytes,
        blocks=record.blocks or (),
    )
