"""What is done with a model that exists: report, export, evaluate, inspect."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kcrprune.artifact.artifact import is_artifact, open_model
from kcrprune.artifact.original import put_back
from kcrprune.artifact.portable import save_for_timm, save_program
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig, load_config, network_of
from kcrprune.errors import ConfigError, DataError
from kcrprune.events import Listener, Note
from kcrprune.families import contract_of
from kcrprune.graphs import ExportResult, export_onnx, metadata_of, open_onnx, runtime
from kcrprune.measure.bench import Bench
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.measure.report import Inspection, ModelReport
from kcrprune.method.cost import MacCost
from kcrprune.plan import AXES, Axis
from kcrprune.run.describe import file_bytes, open_any, report_of_any
from kcrprune.run.folder import newest_model
from kcrprune.run.network import open_for_run, opened_groups
from kcrprune.run.timed import timed
from kcrprune.training.evaluate import Evaluation
from kcrprune.training.evaluate import evaluate as evaluate_on
from kcrprune.training.images.batches import in_order
from kcrprune.training.images.sets import Pictures, open_evaluation
from kcrprune.training.precision import open_accelerator

RECIPES = ("default", "paper")  # those that open different axes


@dataclass(frozen=True)
class Ported:
    """A network for people without kcrprune."""

    path: Path
    form: Literal["timm", "pt2", "original"]
    bytes: int


def report(
    paths: Sequence[Path], *, bench: Bench | None = None, listener: Listener, config: RunConfig | None = None
) -> tuple[ModelReport, ...]:
    """The figures of each checkpoint, artifact, run folder or ONNX file; with `bench` their times, taken in turn.

    `config` says how a checkpoint is read; beside one, what knows itself is read without it.
    """
    network = network_of(config) if config else {}
    knowing = {path for path in paths if path.suffix == ".onnx" or is_artifact(path)}
    told = set(paths) - knowing or knowing
    opened = [open_any(path, network if path in told else {}) for path in paths]
    reports = tuple(map(report_of_any, opened))
    return timed(opened, reports, bench, listener) if bench else reports


def export(
    model: Path | None,
    onnx: Path | None,
    listener: Listener,
    *,
    config: RunConfig | None = None,
    opset: int = 20,
) -> ExportResult:
    """Writes a model as ONNX, verified; without a model, that of the newest run below the current folder."""
    _tell_of_two_runtimes(listener)
    opened = _opened(model, config, listener)
    path = onnx or _beside(opened, "model.onnx")
    macs = count_macs(opened.model, opened.preprocessing.input_size)
    metadata = metadata_of(
        architecture=opened.architecture,
        preprocessing=opened.preprocessing,
        plan=opened.plan,
        outputs=opened.outputs,
        class_names=opened.class_names,
        parameters=count_parameters(opened.model),
        macs=macs,
        dense_macs=opened.record.get("dense_macs"),
    )
    return export_onnx(
        opened.model,
        path,
        input_size=opened.preprocessing.input_size,
        metadata=metadata,
        outputs=opened.outputs,
        opset=opset,
        listener=listener,
    )


def port(
    model: Path | None, out: Path | None, form: Literal["timm", "pt2"], config: RunConfig, listener: Listener
) -> Ported:
    """Writes a model, or that of the newest run, as a program of torch.export or as a folder that timm opens."""
    opened = _opened(model, config, listener)
    path = out or _beside(opened, "model.pt2" if form == "pt2" else "model-timm")
    if form == "pt2":
        save_program(path, opened.model, input_size=opened.preprocessing.input_size)
    else:
        save_for_timm(
            path,
            opened.model,
            architecture=opened.architecture,
            plan=opened.plan,
            preprocessing=opened.preprocessing,
            class_names=opened.class_names,
        )
    return Ported(path, form, file_bytes(path))


def port_into(
    model: Path | None, into: Path, out: Path | None, config: RunConfig, listener: Listener, *, keep_shapes: bool
) -> Ported:
    """Writes the file that a model was made of anew, with the model's tensors in their places."""
    opened = _opened(model, config, listener)
    written = put_back(opened, into, out, _beside(opened, "model").parent, keep_shapes=keep_shapes)
    if written.left_out:
        listener(Note(f"left out of {into}, as no plain data or training's: {', '.join(written.left_out)}"))
    return Ported(written.path, "original", file_bytes(written.path))


def _opened(model: Path | None, config: RunConfig | None, listener: Listener) -> Opened:
    if model is None:
        model = newest_model(Path())
        listener(Note(f"the newest run: {model.parent}"))
    return open_model(model, **network_of(config)) if config else open_model(model)


def _beside(opened: Opened, name: str) -> Path:
    """Where something is written that nobody has named: in the model's folder, or called as its file."""
    if opened.fetched:  # the cache is nobody's folder
        return Path(name.replace("model", opened.fetched.title, 1))
    if not opened.path.is_file():
        return opened.path / name
    return opened.path.with_name(name.replace("model", opened.path.stem, 1))


def _tell_of_two_runtimes(listener: Listener) -> None:
    if (told := runtime.told_of_both()) is not None:
        listener(Note(told, warning=True))


def evaluate(model: Path, config: RunConfig, listener: Listener) -> Evaluation:
    """Accuracy of a model or an ONNX file on labelled images.

    ConfigError without images, or where an ONNX file does not say how its images are prepared.
    """
    if config.data is None and not config.dataset:
        raise ConfigError("evaluate needs images: name a folder with --data, or a timm dataset with --dataset")
    if model.suffix == ".onnx":
        _tell_of_two_runtimes(listener)
        graph = open_onnx(model, img_size=config.img_size)
        if graph.preprocessing is None:
            raise ConfigError(
                f"{model} does not say how its images are prepared; kcrprune export writes graphs that do"
            )
        graph.device = config.device if config.device != "auto" else "cpu"  # what export compared it on
        predict, preprocessing, names = graph, graph.preprocessing, graph.class_names
        pinned = False
        outputs = config.outputs or graph.outputs
        classes = len(names) if names else None
    else:
        opened = open_for_run(model, config)
        device = open_accelerator(config.device, "fp32").device
        predict, preprocessing, names = opened.model.to(device), opened.preprocessing, opened.class_names
        pinned = device.type == "cuda"
        classes, outputs = opened.class_count, opened.outputs
    if outputs == "features":
        raise DataError(
            f"the outputs of {model} are features, which name no class, so there is no top-1 by labels; a run's report "
            "compares them with the dense network's (if they are logits after all, say --outputs classes)"
        )
    images = open_evaluation(
        config.data,
        preprocessing,
        classes,
        dataset=config.dataset,
        split=config.val_split,
        class_map=config.class_map,
        class_names=names,
        workers=config.loaders,
    )
    if isinstance(images, Pictures) and images.source.told:
        listener(Note(images.source.told))
    batches = in_order(images, config.batch_size, workers=config.loaders, pinned=pinned)
    found = evaluate_on(predict, batches, listener=listener)
    if found.top1 is None:
        raise DataError(f"the {found.images:,} images have no labels to evaluate by; name a dataset that has some")
    return found


def inspect(path: Path, config: RunConfig) -> Inspection:
    """What a file holds, how that is known, what can be cut and how far; nothing is trained."""
    opened = open_for_run(path, config)
    macs = count_macs(opened.model, opened.preprocessing.input_size)
    axes: tuple[Axis, ...] = ()
    floor = {}
    if opened.plan is None:
        cost = MacCost.of(opened.model, contract_of(opened.model, opened.preprocessing.input_size), macs)
        allowed = {group.axis for group in cost.contract.groups if not group.whole}
        axes = tuple(axis for axis in AXES if axis in allowed)
        for recipe in RECIPES:
            floor[recipe] = opened_groups(cost, load_config(recipe)).floor() / macs
        floor["all axes"] = opened_groups(cost, config.model_copy(update={"axes": axes})).floor() / macs
    return Inspection(
        source=str(path),
        layout=opened.layout,
        architecture=opened.architecture.name,
        family=opened.architecture.family,
        preprocessing=opened.preprocessing,
        class_count=opened.class_count,
        feature_count=opened.feature_count,
        parameters=count_parameters(opened.model),
        macs=macs,
        file_bytes=opened.file_bytes,
        axes=axes,
        floor=floor,
        notes=opened.notes,
        foreign_names=opened.foreign_names,
    )
