"""Everything that is printed: results to standard output, progress and errors to standard error."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from pydantic_core import to_jsonable_python
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kcrprune import processes
from kcrprune.cli import signals
from kcrprune.cli.progress import LiveProgress, PlainProgress, QuietProgress
from kcrprune.cli.streams import Output, Unheard
from kcrprune.events import Event, Listener
from kcrprune.measure import tables
from kcrprune.measure.report import Comparison, Inspection, ModelReport, Network
from kcrprune.measure.summary import network_table, notes_of, speed_line, tables_of, to_markdown
from kcrprune.printable import printable, printable_json, printable_lines

if TYPE_CHECKING:  # these modules import torch
    from kcrprune.graphs import ExportResult
    from kcrprune.pipeline import Ported, RunResult
    from kcrprune.training.evaluate import Evaluation

OPENED_BY = {  # how people without kcrprune open what was exported
    "pt2": "for torch.export.load(path).module()",
    "original": "for the code of the file that it was made of",
    "timm": "for timm.create_model('local-dir:' + path, pretrained=True)",
}
WIDE = 10_000  # columns of a pipe or a file, where nothing needs to wrap


@contextmanager
def progress(*, quiet: bool) -> Iterator[Listener]:
    """A listener that shows a running job: live in a terminal, as lines elsewhere, warnings only if quiet.

    Of several processes the first shows it.
    """
    if processes.is_silent():
        yield lambda _: signals.raise_again()
        return
    console = _console(Unheard(sys.stderr))
    kind = QuietProgress if quiet else LiveProgress if console.is_interactive else PlainProgress

    with kind(console) as show:

        def listener(event: Event) -> None:
            signals.raise_again()
            show(event)

        yield listener


def run(result: "RunResult", *, as_json: bool = False) -> None:
    """Before and after of a run, and where it lies, once."""
    if processes.is_silent():
        return
    if as_json:
        _json(result)
        return
    _described(result.comparison)
    if result.speed:
        line(speed_line(result.speed, result.comparison))
    line(f"The run is in {result.folder}")


def reports(found: Sequence[ModelReport], *, form: str) -> None:
    """One model, or models side by side."""
    _in_form(list(found), form)


def exported(result: "ExportResult", *, as_json: bool = False) -> None:
    """What was written, and how near ONNX Runtime comes to PyTorch."""
    if as_json:
        _json(result)
        return
    batches = ", ".join(map(str, result.batch_sizes))
    size = tables.file_size(result.bytes)
    line(f"{result.path}: {size}, {result.nodes} nodes, opset {result.opset}")
    line(
        f"ONNX Runtime computes what PyTorch does at batch sizes {batches}: "
        f"largest difference {result.max_abs_diff:.1e}, allowed {result.tolerance:.1e}"
    )


def ported(result: "Ported", *, as_json: bool = False) -> None:
    """What was written, and how it is opened."""
    if as_json:
        _json(result)
    else:
        line(f"{result.path}: {tables.file_size(result.bytes)}, {OPENED_BY[result.form]}")


def evaluation(result: "Evaluation", *, as_json: bool = False) -> None:
    """How a model did on images."""
    if as_json:
        _json(result)
        return
    shares = (("top-1", result.top1), ("top-5", result.top5), ("agreement", result.agreement))
    figures = [f"{name} {tables.percent(value)}" for name, value in shares if value is not None]
    figures += [] if result.loss is None else [f"loss {tables.figure(result.loss)}"]
    line(f"{', '.join(figures)} on {result.images:,} images")


def inspection(found: Inspection, *, form: str = "table") -> None:
    """What a file is."""
    _in_form(found, form)


def networks(found: Sequence[Network], *, form: str = "table") -> None:
    """Which of timm's networks can be cut."""
    if form == "json":
        _json([network.model_dump() for network in found])
        return
    if form == "markdown":
        line(tables.markdown(network_table(found)))
        return
    console = _console(Output(sys.stdout))
    console.print(_drawn(network_table(found)))


def line(text: str) -> None:
    """One line of the result; never wrapped or coloured."""
    _print(_console(Output(sys.stdout)), text)


def failure(text: str) -> None:
    """What went wrong."""
    _print(_console(Unheard(sys.stderr)), text)


def finish() -> None:
    """Sends on what was printed; the errors are those of the results."""
    Output(sys.stdout).flush()


def _in_form(what: Inspection | Sequence[ModelReport], form: str) -> None:
    if form == "json":
        _json(what)
    elif form == "markdown":
        line(to_markdown(what).rstrip())
    else:
        _described(what)


def _described(what: Comparison | Inspection | Sequence[ModelReport]) -> None:
    console = _console(Output(sys.stdout))
    for table in tables_of(what):
        console.print(_drawn(table))
    for note in notes_of(what):
        _print(console, note)


def _drawn(table: tables.Table) -> RichTable:
    drawn = RichTable(
        title=Text(printable(table.title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    facts = table.header[0] == "" and len(table.header) == 2  # a list of facts reads from the left
    for index, name in enumerate(table.header):
        drawn.add_column(Text(printable(name)), justify="left" if facts or index == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    return drawn


def _json(data: Any) -> None:
    plain = (sys.stdout.encoding or "utf-8").lower() != "utf-8"  # which lacks nothing but halves of signs
    text = json.dumps(to_jsonable_python(data, inf_nan_mode="null"), indent=2, ensure_ascii=plain)
    line(printable_json(text))


def _print(console: Console, text: str) -> None:
    console.print(printable_lines(text), markup=False, highlight=False, soft_wrap=True)


def _console(stream: Unheard) -> Console:
    """Rich decides on colour by the stream, NO_COLOR and FORCE_COLOR."""
    return Console(file=cast(TextIO, stream), width=None if stream.isatty() else WIDE, emoji=False)
