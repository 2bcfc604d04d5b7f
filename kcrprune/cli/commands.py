"""The commands: options -> configuration -> pipeline -> render; torch and timm load only when one runs."""

from typing import Any

from kcrprune.cli import render
from kcrprune.cli.options import (
    IMAGES,
    BatchOpt,
    BenchOpt,
    CheckpointArg,
    ConfigOpt,
    FileArg,
    FileOpt,
    FormatOpt,
    FormOpt,
    FreshOpt,
    IntoOpt,
    JsonOpt,
    ListOpt,
    ModelArg,
    OnnxOpt,
    OpsetOpt,
    OtherArg,
    OutOpt,
    ProviderOpt,
    QuietOpt,
    RunArg,
    ShapesOpt,
    ThreadsOpt,
    takes_settings,
)
from kcrprune.config import NETWORK, load_config, origins
from kcrprune.errors import ConfigError
from kcrprune.measure.bench import bench_of


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

        known = origins(file=config, flags=given)
        result = pipeline.compress(checkpoint, settings, out, listener, fresh=fresh, origins=known)
    render.run(result, as_json=as_json)


@takes_settings(*NETWORK)
def report(
    model: ModelArg,
    other: OtherArg = None,
    *,
    bench: BenchOpt = False,
    provider: ProviderOpt = "cpu",
    batch: BatchOpt = "1,8",
    threads: ThreadsOpt = None,
    form: FormatOpt = "table",
    config: ConfigOpt = None,
    quiet: QuietOpt = False,
    given: dict[str, Any],
) -> None:
    """Say what a model is and costs, or compare two."""
    settings = load_config(file=config, flags=given)
    if not bench and (provider, batch, threads) != ("cpu", "1,8", None):
        raise ConfigError("--provider, --batch and --threads say how times are measured; give --bench with them")
    timing = bench_of(provider=provider, batch=batch.split(","), threads=threads) if bench else None
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        paths = [model] if other is None else [model, other]
        reports = pipeline.report(paths, bench=timing, listener=listener, config=settings)
    render.reports(reports, form=form)


@takes_settings(*NETWORK)
def export(
    model: RunArg = None,
    *,
    onnx: OnnxOpt = None,
    form: FormOpt = "onnx",
    out: FileOpt = None,
    opset: OpsetOpt = 20,
    into: IntoOpt = None,
    keep_shapes: ShapesOpt = False,
    config: ConfigOpt = None,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
    given: dict[str, Any],
) -> None:
    """Write a model as ONNX, and check that it computes the same; or in a form for people without kcrprune.

    With --into, a detector's or a segmenter's file gets its cut backbone back under its own names.

    ONNX Runtime and PyTorch are compared at three batch sizes; after a mismatch there is no file at the requested path.
    """
    if onnx is not None and (form != "onnx" or out is not None):
        raise ConfigError("--onnx names an ONNX file; where --format or --out is given, leave it out")
    if into is not None and (form != "onnx" or onnx is not None):
        raise ConfigError("--into writes the file that it names anew; leave --format and --onnx out")
    if keep_shapes and into is None:
        raise ConfigError("--keep-shapes says how --into writes its file; give --into with it")
    settings = load_config(file=config, flags=given)
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        if into is not None:
            result = pipeline.port_into(model, into, out, settings, listener, keep_shapes=keep_shapes)
        elif form == "onnx":
            path = out or (onnx if onnx and onnx.name else None)
            result = pipeline.export(model, path, listener, config=settings, opset=opset)
        else:
            result = pipeline.port(model, out, form, settings, listener)
    if isinstance(result, pipeline.Ported):
        render.ported(result, as_json=as_json)
    else:
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
def inspect(
    file: FileArg = None,
    *,
    list_: ListOpt = False,
    form: FormatOpt = "table",
    config: ConfigOpt = None,
    as_json: JsonOpt = False,
    given: dict[str, Any],
) -> None:
    """Say what a file holds and how far it can be cut; or, with --list, what of each network of timm can be.

    Nothing is trained, and no code of the file is run.
    """
    form = "json" if as_json else form
    if list_ == (file is not None):
        raise ConfigError("inspect takes a FILE, or --list in its place")
    if file is None:
        from kcrprune.checkpoints.networks import networks

        render.networks(networks(), form=form)
        return
    settings = load_config(file=config, flags=given)
    with render.progress(quiet=False):
        from kcrprune import pipeline

        result = pipeline.inspect(file, settings)
    render.inspection(result, form=form)


def demo(*, out: OutOpt = None, quiet: QuietOpt = False) -> None:
    """Go the whole way offline, in about two minutes.

    Trains a small network on handwritten digits, compresses it, exports it and verifies the export.
    """
    with render.progress(quiet=quiet) as listener:
        from kcrprune import pipeline

        result, exported = pipeline.demo(out, listener)
    render.run(result)
    render.exported(exported)
