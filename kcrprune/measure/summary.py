"""Reports in words: the tables that the terminal and `report.md` both draw, so that a figure is worded once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kcrprune.measure import tables
from kcrprune.measure.report import BlockWidths, Comparison, Inspection, ModelReport, Network, StageTime, Timing
from kcrprune.measure.tables import ABSENT, Table
from kcrprune.plan import AXES, Axis

Change = Literal["ratio", "points", "none"]


@dataclass(frozen=True)
class Quantity:
    """A row of the summary: the report's field that it comes from, its value, how it is written, how two compare."""

    field: str
    label: str
    value: Callable[[ModelReport], float | None]
    text: Callable[[float], str]
    change: Change = "ratio"


def _kernel(label: str, figure: str) -> Quantity:
    return Quantity("kernel", label, lambda report: report.kernel and getattr(report.kernel, figure), tables.figure)


def _accuracy(label: str, figure: str, text: Callable[[float], str], change: Change = "ratio") -> Quantity:
    return Quantity(
        "accuracy", label, lambda report: report.accuracy and getattr(report.accuracy, figure), text, change
    )


QUANTITIES: Final = (
    Quantity("parameters", "parameters", lambda report: report.parameters, tables.count),
    Quantity("macs", "MACs of one image", lambda report: report.macs, tables.count),
    Quantity(
        "dense_macs",
        "share of the dense MACs",
        lambda report: _share(report.macs, report.dense_macs),
        tables.figure,
        "none",
    ),
    Quantity("file_bytes", "file size", lambda report: report.file_bytes, tables.file_size),
    Quantity(
        "activation_bytes", "peak activations of one image", lambda report: report.activation_bytes, tables.file_size
    ),
    _kernel("kernel complexity (KC)", "kc"),
    _kernel("KC, trace-normalised", "kc_normalised"),
    _kernel("TNN / trace", "tnn_relative"),
    _kernel("effective rank", "effective_rank"),
    _accuracy("top-1", "top1", tables.percent, "points"),
    _accuracy("top-5", "top5", tables.percent, "points"),
    _accuracy("loss", "loss", tables.figure),
    _accuracy("agreement with the dense network", "agreement", tables.percent, "none"),
    _accuracy("relative squared distance to its features", "distance", tables.figure, "none"),
    _accuracy("cosine with its features", "cosine", tables.figure, "none"),
    _accuracy("retrieval agreement with the dense network", "retrieval", tables.percent, "none"),
)
STATED: Final = "stated: the file's own word, not measured now"


def summary(reports: Sequence[ModelReport], names: Sequence[str] = ()) -> Table:
    """Networks side by side; with two of them a last column says how the second differs from the first."""
    pair = len(reports) == 2
    names = names or [Path(report.source).name for report in reports]
    facts = [
        ("file", *(report.source for report in reports)),
        ("layout", *(report.layout for report in reports)),
        ("state", *(report.state for report in reports)),
        ("architecture", *(report.architecture or ABSENT for report in reports)),
        ("input", *(" x ".join(map(str, report.input_size)) for report in reports)),
        ("outputs", *(report.outputs or ABSENT for report in reports)),
    ]
    rows = [(*fact, "") if pair else fact for fact in facts]
    for quantity in QUANTITIES:
        values = [quantity.value(report) for report in reports]
        if any(value is not None for value in values):
            cells = [_cell(quantity, report, value) for report, value in zip(reports, values, strict=True)]
            rows.append((quantity.label, *cells, *([_change(quantity, *values)] if pair else [])))
    return Table("Summary", ("", *names, *(["change"] if pair else [])), tuple(rows))


def _cell(quantity: Quantity, report: ModelReport, value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{quantity.text(value)} (stated)" if quantity.field in report.stated else quantity.text(value)


def _change(quantity: Quantity, before: float | None, after: float | None) -> str:
    if before is None or after is None or quantity.change == "none":
        return ""
    if quantity.change == "points":
        return f"{100 * (after - before):+.2f} points"
    return f"x {after / before:.3f}" if before else ""


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or whole is None else part / whole


def timing_table(reports: Sequence[ModelReport]) -> Table:
    """Networks that were timed in turn, batch by batch; the ratio is to the first of them."""
    rows = [
        (
            str(timing.batch),
            report.source,
            timing.runtime,
            str(timing.threads),
            str(timing.rounds),
            tables.milliseconds(timing.p50_ms),
            tables.milliseconds(timing.p90_ms),
            _ratio(timing) if timing.ratio else ABSENT,
            ABSENT if timing.realised is None else f"{timing.realised:.2f}",
        )
        for same in zip(*(report.timings for report in reports), strict=True)
        for report, timing in zip(reports, same, strict=True)
    ]
    header = ("images", "file", "runs in", "threads", "rounds", "p50", "p90", "ratio (95 %)", "realised")
    return Table("Time", header, tuple(rows))


def _ratio(timing: Timing) -> str:
    return f"{timing.ratio:.3f} ({timing.ratio_low:.3f} to {timing.ratio_high:.3f})"


def speed_line(timing: Timing, comparison: Comparison) -> str:
    """What a cut buys in time, beside what it took of the MACs."""
    share = _share(comparison.after.macs, comparison.before.macs)
    cut = "" if share is None else f", with {share:.3f} of its MACs"
    realised = "" if timing.realised is None else f": {timing.realised:.2f} of the MACs saved is time saved"
    several = "s at once" if timing.batch > 1 else ""
    target = comparison.settings.get("target_latency")
    asked = "" if target is None else f", {tables.milliseconds(timing.p50_ms)}; the target was {target}"
    threads = f"{timing.threads} thread{'s' if timing.threads > 1 else ''}"
    return (
        f"{timing.batch} image{several} in {timing.ratio:.2f} of the dense time "
        f"({timing.ratio_low:.2f} to {timing.ratio_high:.2f}){asked}{cut}{realised} ({timing.runtime}, {threads})"
    )


def width_table(blocks: Sequence[BlockWidths], of: str = "") -> Table:
    """What each block keeps of each axis; a width that is whole stands alone."""
    title = "Widths" if all(block.kept == block.dense for block in blocks) else "Kept widths"
    axes: list[Axis] = [axis for axis in AXES if any(axis in block.dense for block in blocks)]
    rows = tuple((block.site, *(_width(block, axis) for axis in axes)) for block in blocks)
    return Table(f"{title} of {of}" if of else title, ("block", *axes), rows)


def _width(block: BlockWidths, axis: Axis) -> str:
    if axis not in block.dense:
        return ABSENT
    kept, dense = block.kept[axis], block.dense[axis]
    return str(dense) if kept == dense else f"{kept} of {dense}"


def stage_table(stages: Sequence[StageTime]) -> Table:
    """How long each stage took, what of it is passes and what algebra, and how much memory was needed by its end."""
    peaks = {"peak_memory_mib": "peak memory so far"}
    if any(stage.peak_device_mib is not None for stage in stages):
        peaks["peak_device_mib"] = "of the GPU"
    rows = [
        (
            stage.stage,
            tables.duration(stage.seconds),
            ABSENT if stage.passes is None else f"{stage.passes:.1f}",
            tables.duration(stage.algebra_seconds) if stage.algebra_seconds else ABSENT,
            *(_memory(getattr(stage, peak)) for peak in peaks),
        )
        for stage in stages
    ]
    seconds, algebra = sum(stage.seconds for stage in stages), sum(stage.algebra_seconds for stage in stages)
    highest = (_memory(max((getattr(stage, peak) or 0 for stage in stages), default=0) or None) for peak in peaks)
    total = ("all", tables.duration(seconds), "", tables.duration(algebra) if algebra else ABSENT, *highest)
    header = ("stage", "time", "passes of the dense network", "algebra", *peaks.values())
    return Table("Stages", header, (*rows, total))


def _memory(mebibytes: float | None) -> str:
    return ABSENT if mebibytes is None else tables.file_size(round(mebibytes * 2**20))


def accuracy_table(comparison: Comparison) -> Table:
    """What the cut took and what recovery gave back; columns that nobody measured are left out."""
    measured = (
        ("before", comparison.before.accuracy),
        ("cut and refitted", comparison.cut),
        ("after", comparison.after.accuracy),
    )
    rows = [(name, accuracy.model_dump(exclude={"images"})) for name, accuracy in measured if accuracy]
    columns = {
        "top1": tables.percent,
        "top5": tables.percent,
        "loss": tables.figure,
        "agreement": tables.percent,
        "distance": tables.figure,
        "cosine": tables.figure,
        "retrieval": tables.percent,
    }
    known = [name for name in columns if any(figures[name] is not None for _, figures in rows)]
    cells = tuple(
        (stage, *(ABSENT if figures[name] is None else columns[name](figures[name]) for name in known))
        for stage, figures in rows
    )
    return Table("Accuracy", ("", *known), cells)


def fact_table(inspection: Inspection) -> Table:
    """What a file was found to be."""
    prep = inspection.preprocessing
    rows = [
        ("file", inspection.source),
        ("layout", inspection.layout),
        ("architecture", inspection.architecture),
        ("family", inspection.family),
        ("input", " x ".join(map(str, prep.input_size))),
        ("mean", ", ".join(map(tables.figure, prep.mean))),
        ("std", ", ".join(map(tables.figure, prep.std))),
        ("resize", f"{prep.interpolation}, crop {tables.figure(prep.crop_pct)} ({prep.crop_mode})"),
        ("preprocessing from", prep.source),
        ("features", str(inspection.feature_count))
        if inspection.feature_count
        else ("classes", str(inspection.class_count)),
        ("parameters", tables.count(inspection.parameters)),
        ("MACs of one image", tables.count(inspection.macs)),
        ("file size", tables.file_size(inspection.file_bytes)),
        ("can be cut", ", ".join(inspection.axes) or "nothing"),
        *((f"floor of recipe {name}", tables.figure(share)) for name, share in inspection.floor.items()),
    ]
    return Table("What it is", ("", "value"), tuple(rows))


def network_table(networks: Sequence[Network]) -> Table:
    """Timm's networks by name: what can be cut, the smallest share of the MACs, and what stays whole."""
    rows = tuple(
        (
            network.name,
            ", ".join(network.axes) or "refused",
            ABSENT if network.floor is None else f"{network.floor:.3f}",
            network.refused or "; ".join(f"{kind}: {reason}" for kind, reason in network.whole.items()) or ABSENT,
        )
        for network in networks
    )
    return Table("Networks of timm", ("name", "axes", "floor", "stays whole"), rows)


def tables_of(what: Comparison | Inspection | Sequence[ModelReport]) -> tuple[Table, ...]:
    """Everything that is shown as a table, in order; Markdown and the terminal draw the same ones."""
    if isinstance(what, Inspection):
        return (fact_table(what),)
    if isinstance(what, Comparison):
        shown = [summary((what.before, what.after), ("before", "after"))]
        shown += [accuracy_table(what)] if what.cut else []
        shown += [width_table(what.after.blocks)] if what.after.blocks else []
        shown += [stage_table(what.stages)] if what.stages else []
        return tuple(shown)
    widths = [width_table(report.blocks, report.source) for report in what if report.blocks]
    times = (timing_table(what),) if all(report.timings for report in what) else ()
    return (summary(what), *times, *widths)


def notes_of(what: Comparison | Inspection | Sequence[ModelReport]) -> tuple[str, ...]:
    """The sentences that belong to the tables."""
    if isinstance(what, Inspection):
        names = what.foreign_names
        pickled = (f"The pickle names {', '.join(names)}; nothing was imported.",) if names else ()
        return (*what.notes, *pickled)
    reports = (what.before, what.after) if isinstance(what, Comparison) else tuple(what)
    own = what.notes if isinstance(what, Comparison) else ()
    stated = (STATED,) if any(report.stated for report in reports) else ()
    return tuple(dict.fromkeys((*own, *(note for report in reports for note in report.notes), *stated)))


def to_markdown(what: Comparison | Inspection | ModelReport | Sequence[ModelReport]) -> str:
    """A Markdown document about a run, a file, or networks side by side."""
    if isinstance(what, ModelReport):
        what = (what,)
    parts = [f"# {tables.escaped(_title(what))}", *map(tables.markdown, tables_of(what))]
    if isinstance(what, Comparison):
        said = [tables.code(f"{name} = {json.dumps(value)}") for name, value in what.settings.items()]
        parts.append("\n".join(["## Configuration", "", ", ".join([*said, "and all of it in `config.toml`."])]))
    if notes := notes_of(what):
        parts.append("\n".join(["## Notes", "", *(f"- {tables.escaped(note)}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _title(what: Comparison | Inspection | Sequence[ModelReport]) -> str:
    if isinstance(what, Comparison):
        share = _share(what.after.macs, what.before.macs)
        reached = "cut" if share is None else f"cut to {share:.3f} of its MACs"
        return f"{what.before.architecture or Path(what.before.source).name}: {reached}"
    if isinstance(what, Inspection):
        return Path(what.source).name
    return " and ".join(Path(report.source).name for report in what)
