"""What a run of kernel_term.py leaves, and the tables that are made of many (no torch).

Every figure is a mean over seeds with its standard deviation, except for differences: those are paired, run by run of
one seed, and come with their standard error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np

from kcrprune.measure.tables import ABSENT, Table, duration, markdown

GRID, SPLIT = "grid", "split"
Groups = Mapping[str, Mapping[str, Any]]  # block or head -> {"width": dense channels, "indices": those kept}
Figure = Callable[["Row"], float | None]


@dataclass(frozen=True)
class Cell:
    """What runs of several seeds have in common."""

    part: str
    method: str  # scores, search, or paper
    share: float  # of the training images
    kernel_weight: float
    search_split: float | None = None  # share that weights learn on; None is the default

    @property
    def name(self) -> str:
        """The cell as part of a file name."""
        split = "" if self.search_split is None else f"-split{self.search_split:g}"
        return f"{self.part}-{self.method}-kernel{self.kernel_weight:g}-share{self.share:g}{split}"


@dataclass(frozen=True)
class Row:
    """One finished run; accuracies in percent, losses in nats, `kernel` figures as in the run's own report."""

    cell: Cell
    seed: int
    macs_share: float
    top1_dense: float
    top1_cut: float  # after cut and refit
    loss_cut: float
    top1: float  # after recovery
    loss: float
    train_images: int  # images that the run trained on, as they are, on which the next two are measured
    train_top1: float
    train_loss: float
    kernel_before: Mapping[str, float]
    kernel: Mapping[str, float]
    held_out_before: float
    held_out_after: float
    kept_step: int
    chosen: str  # the plan that was kept: search or scores
    uncorrected: Mapping[str, float]  # distance to the dense network by plan, after the cut and before the refit
    distances: Mapping[str, float]  # the same after the refit
    kept: Mapping[str, Groups]  # by axis
    stages: Mapping[str, float]  # seconds
    seconds: float
    peak_memory_mib: float  # of the process so far

    @property
    def gap(self) -> float:
        """Accuracy on images trained on less that on test images, in points."""
        return self.train_top1 - self.top1

    @property
    def loss_gap(self) -> float:
        """Loss on test images less that on images trained on."""
        return self.loss - self.train_loss


def row_from(found: Mapping[str, Any]) -> Row:
    """A row from what `asdict` made of it."""
    return Row(**{**found, "cell": Cell(**found["cell"])})


FIGURES: Mapping[str, tuple[str, Figure]] = {  # name -> (format, figure)
    "MACs": ("{:.4f}", lambda row: row.macs_share),
    "top-1 cut": ("{:.2f}", lambda row: row.top1_cut),
    "top-1": ("{:.2f}", lambda row: row.top1),
    "test loss": ("{:.4f}", lambda row: row.loss),
    "train top-1": ("{:.2f}", lambda row: row.train_top1),
    "train loss": ("{:.4f}", lambda row: row.train_loss),
    "gap": ("{:.2f}", lambda row: row.gap),
    "loss gap": ("{:.4f}", lambda row: row.loss_gap),
    "KC dense": ("{:.5f}", lambda row: row.kernel_before["kc"]),
    "KC": ("{:.5f}", lambda row: row.kernel["kc"]),
    "KC normalised dense": ("{:.5f}", lambda row: row.kernel_before["kc_normalised"]),
    "KC normalised": ("{:.5f}", lambda row: row.kernel["kc_normalised"]),
    "TNN relative dense": ("{:.4f}", lambda row: row.kernel_before["tnn_relative"]),
    "TNN relative": ("{:.4f}", lambda row: row.kernel["tnn_relative"]),
    "effective rank dense": ("{:.2f}", lambda row: row.kernel_before["effective_rank"]),
    "effective rank": ("{:.2f}", lambda row: row.kernel["effective_rank"]),
    "held-out cut": ("{:.4f}", lambda row: row.held_out_before),
    "held-out": ("{:.4f}", lambda row: row.held_out_after),
    "kept step": ("{:.0f}", lambda row: row.kept_step),
}
ACCURACY = ("MACs", "top-1 cut", "top-1", "test loss", "train top-1", "train loss", "gap", "loss gap")
KERNEL = tuple(name for name in FIGURES if name.startswith(("KC", "TNN", "effective")))
COURSE = ("held-out cut", "held-out", "kept step")
COMPARED = ("top-1", "test loss", "gap", "loss gap", "KC", "KC normalised", "TNN relative")
OUTCOMES = ("top-1", "test loss", "gap", "loss gap")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation of a sample; None of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(on: Mapping[int, float], off: Mapping[int, float]) -> tuple[int, float, float | None]:
    """Seeds that both have, the mean over them of on minus off, and its standard error; of no seed, nan."""
    seeds = sorted(on.keys() & off.keys())
    if not seeds:
        return 0, float("nan"), None
    mean, deviation = mean_and_deviation([on[seed] - off[seed] for seed in seeds])
    return len(seeds), mean, None if deviation is None else deviation / sqrt(len(seeds))


def overlap(one: Groups, other: Groups) -> tuple[float, float]:
    """Jaccard overlap of the kept channels of two plans, and that of random sets as large in every block and head.

    Both count intersections and unions over all groups first; a group that one plan dropped is empty there.
    """
    found, random, sizes = 0, 0.0, 0
    for name in one.keys() | other.keys():
        a, b = (set(groups[name]["indices"]) if name in groups else set() for groups in (one, other))
        found += len(a & b)
        random += len(a) * len(b) / (one.get(name) or other[name])["width"]
        sizes += len(a) + len(b)
    return found / (sizes - found), random / (sizes - random)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None where one of the two does not vary, or for fewer than three pairs."""
    a, b = (ranks(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = sqrt(float(a @ a) * float(b @ b))
    return None if len(x) < 3 or scale == 0 else float(a @ b) / scale


def without_means(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Every value less the mean of its group; rounded, so that equal ones stay equal."""
    means = {group: np.mean([v for v, g in zip(values, groups, strict=True) if g == group]) for group in set(groups)}
    return [round(float(value - means[group]), 9) for value, group in zip(values, groups, strict=True)]


def by_cell(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """Rows by what they share, in the order of the first of each."""
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    return cells


def to_markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """All tables of what is finished, and below them where and how they were made."""
    grid = [row for row in rows if row.cell.part == GRID]
    split = [row for row in rows if row.cell.part == SPLIT]
    tables = []
    if grid:
        tables += [
            _cells("Accuracy", grid, ACCURACY),
            _cells("Kernel complexity", grid, KERNEL),
            _cells("Held-out loss and kept plan", grid, COURSE, ("plan kept", _chosen)),
            _plans(grid),
            _differences(grid),
            _correlations(grid),
            _stability("Kept channels over seeds", grid),
        ]
    if split:
        names = ("top-1 cut", "top-1", "test loss", "gap", "KC", "KC normalised", "held-out")
        tables += [
            _cells("Split of the search", split, names, ("range of top-1", _top1_range)),
            _stability("Kept channels over seeds, by split", split),
        ]
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join([*map(markdown, [*tables, _cost(rows)]), f"{told}\n"])


def _label(cell: Cell) -> tuple[str, str, str]:
    method = cell.method if cell.search_split is None else f"{cell.method}, split {cell.search_split:g}"
    return method, f"{cell.kernel_weight:g}", f"{cell.share:g}"


def _cells(
    title: str,
    rows: Sequence[Row],
    names: Sequence[str],
    last: tuple[str, Callable[[Sequence[Row]], str]] | None = None,
) -> Table:
    """Mean ± standard deviation of some figures, a row for each cell; `last` is one more column."""
    lines = []
    for cell, members in by_cell(rows).items():
        further = () if last is None else (last[1](members),)
        lines.append((*_label(cell), str(len(members)), *(_spread(members, name) for name in names), *further))
    header = ("method", "kernel weight", "share of images", "seeds", *names, *(() if last is None else (last[0],)))
    return Table(title, header, tuple(lines))


def _spread(rows: Sequence[Row], name: str) -> str:
    form, figure = FIGURES[name]
    return with_error(form, *mean_and_deviation([value for row in rows if (value := figure(row)) is not None]))


def with_error(form: str, mean: float, error: float | None, sign: str = "") -> str:
    """A mean in `form` and, where there is one, its error."""
    told = form.replace(":", f":{sign}").format(mean)
    return told if error is None else f"{told} ± {form.format(error)}"


def _chosen(rows: Sequence[Row]) -> str:
    names = [row.chosen for row in rows]
    return ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))


def _top1_range(rows: Sequence[Row]) -> str:
    return f"{min(row.top1 for row in rows):.2f} to {max(row.top1 for row in rows):.2f}"


def _plans(rows: Sequence[Row]) -> Table:
    """How near the plans of scores and search come to the dense network at the first look, where there was one."""
    lines = []
    for cell, members in by_cell([row for row in rows if len(row.distances) > 1]).items():
        texts = [
            with_error("{:.3g}", *mean_and_deviation([row.distances[plan] for row in members]))
            for plan in ("scores", "search")
        ]
        sides = ({row.seed: row.distances[plan] for row in members} for plan in ("search", "scores"))
        seeds, mean, error = paired(*sides)
        lines.append((*_label(cell), str(seeds), *texts, with_error("{:.2g}", mean, error, sign="+")))
    header = (
        "method", "kernel weight", "share of images", "seeds", "scores", "search",
        "search minus scores, ± standard error",
    )  # fmt: skip
    return Table("Distance to the dense network of the two plans", header, tuple(lines))


def _differences(rows: Sequence[Row]) -> Table:
    """With the kernel term less without it, seed by seed."""
    cells, lines = by_cell(rows), []
    for cell, members in cells.items():
        off = cells.get(Cell(cell.part, cell.method, cell.share, 0.0, cell.search_split), [])
        if cell.kernel_weight == 0 or not ({row.seed for row in members} & {row.seed for row in off}):
            continue
        seeds, texts = 0, []
        for name in COMPARED:
            form, figure = FIGURES[name]
            seeds, mean, error = paired(*({row.seed: figure(row) for row in side} for side in (members, off)))
            texts.append(with_error(form, mean, error, sign="+"))
        lines.append((*_label(cell), str(seeds), *texts))
    header = ("method", "kernel weight", "share of images", "seeds", *COMPARED)
    return Table("With the kernel term minus without, ± standard error", header, tuple(lines))


def _correlations(rows: Sequence[Row]) -> Table:
    """Whether networks of one size do better where their kernel complexity is lower."""
    lines = []
    for share in sorted({row.cell.share for row in rows}, reverse=True):
        chosen = [row for row in rows if row.cell.share == share]
        seeds = [row.seed for row in chosen]
        for within in (False, True):
            columns = {name: [FIGURES[name][1](row) for row in chosen] for name in ("KC", "KC normalised", *OUTCOMES)}
            if within:
                columns = {name: without_means(values, seeds) for name, values in columns.items()}
            for name in ("KC", "KC normalised"):
                found = [spearman(columns[name], columns[outcome]) for outcome in OUTCOMES]
                texts = [ABSENT if value is None else f"{value:+.2f}" for value in found]
                what = f"{name}, seeds' means taken off" if within else name
                lines.append((f"{share:g}", what, str(len(chosen)), *texts))
    header = ("share of images", "rank correlation of", "runs", *(f"with {name}" for name in OUTCOMES))
    return Table("Networks of one size and different kernel complexity", header, tuple(lines))


def _stability(title: str, rows: Sequence[Row]) -> Table:
    """Mean overlap of kept channels between seeds, and between plans with and without the term of one seed."""
    cells, lines = by_cell(rows), []
    for cell, members in cells.items():
        lines += _overlaps(cell, "seeds", list(combinations(members, 2)))
        off = {row.seed: row for row in cells.get(Cell(cell.part, cell.method, cell.share, 0.0, cell.search_split), [])}
        if cell.kernel_weight > 0:
            pairs = [(row, off[row.seed]) for row in members if row.seed in off]
            lines += _overlaps(cell, "with and without the term, one seed", pairs)
    header = ("method", "kernel weight", "share of images", "between", "axis", "pairs", "overlap", "random sets")
    return Table(title, header, tuple(lines))


def _overlaps(cell: Cell, between: str, pairs: Sequence[tuple[Row, Row]]) -> list[tuple[str, ...]]:
    lines = []
    for axis in pairs[0][0].kept if pairs else ():
        if not any(_is_cut(row.kept[axis]) for pair in pairs for row in pair):
            continue
        found, random = np.mean([overlap(one.kept[axis], other.kept[axis]) for one, other in pairs], axis=0)
        lines.append((*_label(cell), between, axis, str(len(pairs)), f"{found:.3f}", f"{random:.3f}"))
    return lines


def _is_cut(groups: Groups) -> bool:
    return any(len(group["indices"]) < group["width"] for group in groups.values())


def _cost(rows: Sequence[Row]) -> Table:
    """Mean seconds of every stage, by method and share of the images."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(f"{row.cell.method}, share {row.cell.share:g}", []).append(row)
    stages = list(dict.fromkeys(stage for row in rows for stage in row.stages))
    lines = [(stage, *(_mean_seconds(members, stage) for members in kinds.values())) for stage in stages]
    totals = (np.mean([sum(row.stages.values()) for row in members]) for members in kinds.values())
    lines.append(("all stages", *(duration(float(total)) for total in totals)))
    peaks = (max(row.peak_memory_mib for row in members) for members in kinds.values())
    lines.append(("peak memory of the process so far", *(f"{peak:,.0f} MiB" for peak in peaks)))
    return Table("Cost: mean time of every stage", ("stage", *kinds), tuple(lines))


def _mean_seconds(rows: Sequence[Row], stage: str) -> str:
    found = [row.stages[stage] for row in rows if stage in row.stages]
    return duration(float(np.mean(found))) if found else ABSENT
