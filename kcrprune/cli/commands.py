"""The commands: options -> configuration -> pipeline -> render; torch and timm load only when one runs."""

from typing import Any

from kcrprune.cli import render
from kcrprune.cli.options import (
    IMAGES,
    CheckpointArg,
    ConfigOpt,
    FileArg,
    FormatOpt,
    FreshOpt,
    JsonOpt,
    LatencyOpt,
    ModelArg,
    OnnxOpt,
    OtherArg,
    OutOpt,
    QuietOpt,
    RunArg,
    takes_settings,
)
from kcrprune.config import NETWORK, load_config


@takes_settings()
def compress(
    checkpoint: CheckpointArg,
    *,
    out: OutOpt = None,
    config: ConfigOpt = None,
    fresh: FreshOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
    given: dict[str, Any],
) -> None:
    """Cut a pretrained network to a share of its MACs.

    Without --data the images are generated and the dense network is the teacher, so a checkpoint alone is enough.
    A run that was stopped goes on when the same command is given again.
    """
    settings = load_config(file=config, flags=given)
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        result = pipeline.compress(checkpoint, settings, out, listener, fresh=fresh)
    render.run(result, as_json=as_json)


def report(
    model: ModelArg,
    other: OtherArg = None,
    *,
    latency: LatencyOpt = False,
    form: FormatOpt = "table",
    quiet: QuietOpt = False,
) -> None:
    """Say what a model is and costs, or compare two."""
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        paths = [model] if other is None else [model, other]
        reports = pipeline.report(paths, latency=latency, listener=listener)
    render.reports(reports, form=form)


def export(model: RunArg = None, *, onnx: OnnxOpt = None, quiet: QuietOpt = False, as_json: JsonOpt = False) -> None:
    """Write a model as ONNX, and check that it computes the same.

    ONNX Runtime and PyTorch are compared at three batch sizes; after a mismatch there is no file at the requested path.
    """
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        result = pipeline.export(model, onnx if onnx and onnx.name else None, listener)
    render.exported(result, as_json=as_json)


@takes_settings(*IMAGES, *NETWORK)
def evaluate(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
    given: dict[str, Any],
) -> None:
    """Measure a model, or an ONNX file, on labelled images."""
    settings = load_config(file=config, flags=given)
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        result = pipeline.evaluate(model, settings, listener)
    render.evaluation(result, as_json=as_json)


@takes_settings(*NETWORK)
def inspect(file: FileArg, *, config: ConfigOpt = None, as_json: JsonOpt = False, given: dict[str, Any]) -> None:
    """Say what a file holds and how far it can be cut.

    Nothing is trained, and no code of the file is run.
    """
    settings = load_config(file=config, flags=given)
    with render.progress(quiet=False):
        from kcrprune import pipeline

        result = pipeline.inspect(file, settings)
    render.inspection(result, as_json=as_json)


def demo(*, out: OutOpt = None, quiet: QuietOpt = False) -> None:
    """Go the whole way offline, in about two minutes.

    Trains a small network on handwritten digits, compresses it, exports it and verifies the export.
    """
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        result, exported = pipeline.demo(out, listener)
    render.run(result)
    render.exported(exported)
