"""What a row of peers.py holds, and how the rows are shown.

No torch here: a process that starts another one hands on the memory that it holds as the least that is measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kcrprune.measure.tables import ABSENT, Table, duration, markdown

DENSE = "dense"
HEADINGS = (
    "target", "method", "MACs", "parameters", "top-1 before", "top-1 after", "to dense", "rate",
    "latency", "latency dense", "pruning", "passes", "recovery", "memory", "remark",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """What is the same for every row of a comparison."""

    seed: int
    steps: int  # of recovery
    batch_size: int
    rates: tuple[float, ...]  # of recovery; the one with the lowest held-out loss is kept
    scratch_rates: tuple[float, ...]  # likewise, for a network that starts from nothing
    test_images: int
    threads: int


@dataclass(frozen=True)
class Recovery:
    """One training of a pruned network; losses are those of the held-out images."""

    rate: float
    loss_before: float
    loss_after: float
    kept_step: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One network by one method at one target; what is None was not reached, and `failure` says why.

    Top-1 in percent; latencies in ms of one image in ONNX Runtime; memory is the largest of the row's own process.
    """

    network: str
    target: float
    method: str
    macs: int | None = None
    dense_macs: int | None = None
    parameters: int | None = None
    top1_before: float | None = None
    top1: float | None = None
    difference: float | None = None  # of top1 to that of the dense network, in points
    difference_error: float | None = None  # its standard error; both answered the same images
    rate: float | None = None
    recoveries: tuple[Recovery, ...] = ()
    latency_ms: float | None = None
    latency_dense_ms: float | None = None
    prune_seconds: float | None = None
    prune_passes: float | None = None  # the same time in passes of the dense network over the calibration images
    recover_seconds: float | None = None  # of the kept rate
    prune_peak_mb: float | None = None  # loading included
    peak_mb: float | None = None
    failure: str | None = None


def row_from(found: Mapping[str, Any]) -> Row:
    """A row from what `asdict` made of it."""
    return Row(**{**found, "recoveries": tuple(Recovery(**recovery) for recovery in found["recoveries"])})


def to_markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """A table for each network, and below them where and how they were made."""
    names = list(dict.fromkeys(row.network for row in rows))
    tables = [
        markdown(Table(name, HEADINGS, tuple(_cells(row) for row in rows if row.network == name))) for name in names
    ]
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join([*tables, f"{told}\n"])


def _cells(row: Row) -> tuple[str, ...]:
    share = None if row.macs is None or row.dense_macs is None else row.macs / row.dense_macs
    return (
        f"{row.target:g}",
        row.method,
        _shown("{:.4f}", share),
        _shown("{:,}", row.parameters),
        _shown("{:.2f} %", row.top1_before),
        _shown("{:.2f} %", row.top1),
        ABSENT if row.difference is None else f"{row.difference:+.2f} ± {row.difference_error:.2f}",
        _shown("{:g}", row.rate),
        _shown("{:.2f} ms", row.latency_ms),
        _shown("{:.2f} ms", row.latency_dense_ms),
        ABSENT if row.prune_seconds is None else duration(row.prune_seconds),
        _shown("{:.1f}", row.prune_passes),
        ABSENT if row.recover_seconds is None else duration(row.recover_seconds),
        _shown("{:,.0f} MB", row.peak_mb),
        row.failure or "",
    )


def _shown(form: str, number: float | None) -> str:
    return ABSENT if number is None else form.format(number)


def ordered(rows: Iterable[Row], networks: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Rows by network, target from large to small, and method, all in the order that was asked for."""
    return sorted(rows, key=lambda row: (networks.index(row.network), -row.target, methods.index(row.method)))
