"""The last stages of a run: the pruned network measured, saved and reported."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from pydantic_core import to_jsonable_python
from torch import nn

from kcrprune import processes
from kcrprune.artifact.artifact import DTYPES, MODEL_FILE, open_model, rounded_, save_model
from kcrprune.atomic import write_atomically
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig
from kcrprune.errors import ran_out_of_memory
from kcrprune.measure.macs import count_macs
from kcrprune.measure.report import Accuracy, Comparison, KernelFigures, Timing
from kcrprune.measure.summary import to_markdown
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import ALL, FREE, PLACES, Context, Record
from kcrprune.run.cutting import Cut, Recovery
from kcrprune.run.describe import kernel_figures, report_of
from kcrprune.run.folder import RECORD, REPORT, STORE
from kcrprune.run.machine import machine_record, peak_device_mib, peak_memory_mib
from kcrprune.run.measuring import Reference, accuracy_on
from kcrprune.run.metrics import LOG, line
from kcrprune.run.opening import FromFile, FromFolder, Network, Pool, as_used
from kcrprune.run.pricing import Times
from kcrprune.run.shared import repeating, without_places
from kcrprune.run.store import Result
from kcrprune.run.timed import speed_of
from kcrprune.training.features import feature_covariance
from kcrprune.training.portions import Portions

TIMES = "times.json"  # the table of a run whose target is a time, which another run may take
SECONDS = 2.0  # of timing, where the networks are not too slow for it


class Measured(Result):
    """The pruned network's figures."""

    kernel: KernelFigures
    accuracy: Accuracy | None


def measure_pruned(
    context: Context, network: FromFile, pool: Pool, reference: Reference, cut: Cut, recovery: Recovery | None
) -> Measured:
    """The same figures as of the dense network, and how often the two agree."""
    model = rounded_(_final(network, cut, recovery), DTYPES[context.settings.dtype])
    with context.part("measure pruned"):
        portions = Portions("measure pruned", context.device, context.listener)
        covariance = portions.of_batches(pool.parts.calibration, partial(feature_covariance, model))
        kernel = kernel_figures(covariance, context.settings.kernel_rank)
        accuracy = accuracy_on(context, network, pool, model, reference.replayed(network))
    counted = count_macs(model, network.opened.preprocessing.input_size)
    assert counted == network.cost.predicted(cut.plan), "predicted and counted MACs differ"
    return Measured(kernel=kernel, accuracy=accuracy)


def _final(network: Network, cut: Cut, recovery: Recovery | None) -> nn.Module:
    return network.pruned(cut.plan, recovery.weights if recovery else cut.weights)


def save(context: Context, *results: Any) -> Comparison:
    """Writes the files of the run, its record last: a folder that has one is finished.

    Of several processes the first writes.
    """
    found = processes.of_first(lambda: _saved(context, *results).model_dump(mode="json"))
    return Comparison.model_validate(found)


def _saved(
    context: Context,
    network: FromFile,
    pool: FromFolder,
    times: Times | None,
    reference: Reference,
    cut: Cut,
    recovery: Recovery | None,
    measured: Measured,
) -> Comparison:
    config, folder = as_used(context.settings, network), context.folder
    assert folder is not None, "a run that saves has a folder"
    with context.part("save"):
        _write_model(folder, context, network, pool, cut, recovery, measured)
        after = open_model(folder / MODEL_FILE)
        if times:
            write_json(folder / TIMES, times.table.model_dump(mode="json"))
    here = times is None or times.here
    speed = _speed(context, network, times, cut, after.model) if config.bench and here else None
    told = context.told()
    comparison = Comparison(
        before=report_of(
            network.opened,
            kernel=reference.kernel,
            accuracy=reference.accuracy,
            dense_macs=network.cost.dense if network.opened.plan else None,
        ),
        after=report_of(after, kernel=measured.kernel, accuracy=measured.accuracy, dense_macs=network.cost.dense),
        cut=recovery.cut if recovery else None,
        stages=tuple(told.times),
        settings=config.model_dump(mode="json", exclude_defaults=True, exclude={*FREE, *PLACES}),
        notes=tuple(told.notes),
    )
    places = {path: name for name in PLACES if (path := getattr(config, name)) is not None}
    words = {**places, network.opened.path: network.opened.path.name, folder: "run"}
    comparison = placeless(comparison, words)
    source = {
        "command": repeating(context.checkpoint, context.config, folder),
        "images": pool.fingerprint,
        "input": _input(network.opened),
    }
    write_results(context, cut.plan, comparison, config, told, source, speed)
    return comparison


def _input(opened: Opened) -> dict[str, str]:
    """Which file a run was made of, and what it was fetched as."""
    found = {"path": str(opened.path), "sha256": opened.digest}
    if opened.fetched:
        found |= {"name": opened.fetched.name, "hub": opened.fetched.repository, "revision": opened.fetched.revision}
    return found


def _speed(context: Context, network: FromFile, times: Times | None, cut: Cut, pruned: nn.Module) -> Timing | None:
    """How long the cut network takes beside the dense one; a clock's figure, which no other file takes in.

    None, and a warning, where memory runs out: the network is made, and nothing is lost for its time.
    """
    context.tell(f"timing both networks, about {SECONDS:g} seconds")
    share = network.cost.predicted(cut.plan) / network.cost.dense
    batch = times.table.batch if times else None
    try:
        return speed_of(network.dense, pruned.to(context.device), network.inputs, share, SECONDS, batch)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        context.tell("memory ran out, so the networks are not timed", True)
        return None


def placeless(comparison: Comparison, words: Mapping[str | Path, str]) -> Comparison:
    """A comparison whose sentences and sources name no place; a folder may be called as a state or an axis is."""
    before, after = (
        report.model_copy(update={"source": without_places(report.source, words)})
        for report in (comparison.before, comparison.after)
    )
    notes = tuple(without_places(comparison.notes, words))
    return comparison.model_copy(update={"before": before, "after": after, "notes": notes})


def write_results(
    context: Context,
    plan: ChannelPlan,
    comparison: Comparison,
    config: RunConfig,
    told: Record,
    source: Mapping[str, Any],
    speed: Timing | None = None,
) -> None:
    """What a run's folder holds beside the network; `source` says what it was made of. The record is the last."""
    folder = context.folder
    assert folder is not None, "a run that saves has a folder"
    write_json(folder / "plan.json", plan.model_dump(mode="json"))
    write_json(folder / REPORT, comparison.model_dump(mode="json"))
    write_text(folder / "report.md", to_markdown(comparison))
    write_text(folder / "config.toml", to_toml(config))
    write_text(folder / LOG, to_lines(told.history))
    write_json(folder / RECORD, _record(context, config, told, source) | {"speed": speed})


def _write_model(
    folder: Path,
    context: Context,
    network: FromFile,
    pool: FromFolder,
    cut: Cut,
    recovery: Recovery | None,
    found: Measured,
) -> None:
    opened, fresh, config = network.opened, folder / STORE / MODEL_FILE, as_used(context.settings, network)
    fresh.unlink(missing_ok=True)
    save_model(
        fresh,
        _final(network, cut, recovery).cpu(),
        dtype=DTYPES[context.settings.dtype],
        architecture=opened.architecture,
        plan=cut.plan,
        preprocessing=opened.preprocessing,
        outputs=opened.outputs,
        class_names=opened.class_names or pool.images.class_names,
        record={
            "config": config.model_dump(mode="json", exclude={*FREE, *PLACES}),
            "images": pool.fingerprint,
            "dense_digest": opened.record.get("dense_digest", opened.digest),
            "dense_macs": network.cost.dense,
            "kernel": found.kernel.model_dump(mode="json"),
            "accuracy": found.accuracy and found.accuracy.model_dump(mode="json"),
        },
    )
    fresh.replace(folder / MODEL_FILE)


def _record(context: Context, config: RunConfig, told: Record, source: Mapping[str, Any]) -> dict[str, Any]:
    return machine_record(context.device) | {
        **source,
        "origins": {name: context.origins.get(name, "default") for name in ALL},
        "seed": config.seed,
        "stages": {time.stage: time.seconds for time in told.times},
        "processes": processes.count(),
        "sent_bytes": {name: found.sent_bytes for name, found in context.records.items() if found.sent_bytes},
        "peak_memory_mib": peak_memory_mib(),
        "peak_device_mib": peak_device_mib(context.device),
        "decisions": told.decisions,
    }


def to_toml(config: RunConfig) -> str:
    """A configuration as the TOML file that repeats it; options that are unset are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def to_lines(histories: Mapping[str, list[dict[str, int | float | None]]]) -> str:
    """One line of JSON for every training step."""
    return "".join(line(stage, row) for stage, rows in histories.items() for row in rows)


def write_json(path: Path, data: Any) -> None:
    """Readable JSON with a final newline."""
    write_text(path, json.dumps(to_jsonable_python(data, inf_nan_mode="null"), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that appears whole, in the place of what an earlier attempt may have left.

    Of names that are not UTF-8, what is not is written as its number, which JSON reads as it was.
    """
    write_atomically(path, lambda file: file.write_bytes(text.encode("utf-8", "backslashreplace")), replace=True)
