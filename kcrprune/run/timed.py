"""Networks timed in turn, each by the runtime that is asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from kcrprune.checkpoints.dense import Opened
from kcrprune.events import Listener, StageEnded, StageStarted, StepDone
from kcrprune.graphs import OnnxModel, export_onnx, open_onnx
from kcrprune.measure.bench import Bench
from kcrprune.measure.report import ModelReport, Timing
from kcrprune.measure.timing import in_turn, timings_of
from kcrprune.training.precision import open_accelerator

SECONDS = 5.0  # of each batch size, where the networks are not too slow for it
Ran = tuple[Callable[[Tensor], object], tuple[int, ...], torch.device, str]  # call, input size, device, runtime


def timed(
    opened: Sequence[Opened | OnnxModel], reports: Sequence[ModelReport], bench: Bench, listener: Listener
) -> tuple[ModelReport, ...]:
    """Reports of networks with their times; that of a second one also with the ratio to the first.

    ConfigError where the provider is not there, ExportError where a network has no graph.
    """
    listener(StageStarted("time", len(bench.batch)))
    start = perf_counter()
    with ExitStack() as stack:
        threads = stack.enter_context(_threads(bench.threads))
        here = Path(stack.enter_context(TemporaryDirectory()))
        ran = [_ran(each, bench, here / f"{number}.onnx", listener) for number, each in enumerate(opened)]
        rows = []
        for number, batch in enumerate(bench.batch, start=1):
            rows.append(_timings(ran, batch, threads, SECONDS))
            listener(StepDone("time", number))
    listener(StageEnded("time", perf_counter() - start))
    shares = [_share_saved(reports[0], report) for report in reports]
    return tuple(
        report.model_copy(update={"timings": tuple(_realised(row[number], shares[number]) for row in rows)})
        for number, report in enumerate(reports)
    )


def speed_of(
    dense: nn.Module,
    pruned: nn.Module,
    inputs: Callable[[int], Any],
    share: float,
    seconds: float,
    batch: int | None = None,
) -> Timing:
    """How a cut network compares with the dense one on their own device, where it has `share` of the MACs.

    `inputs` makes a batch of so many images; None: see `usual_batch`.
    """
    device = next(dense.parameters()).device
    batch = batch or usual_batch(device)
    images = inputs(batch)
    times = in_turn([(dense, images), (pruned, images)], seconds=seconds)
    found = timings_of(times, batch, 2 * [_torch_on(device)], torch.get_num_threads())
    return _realised(found[1], 1 - share)


def usual_batch(device: torch.device) -> int:
    """One image on a CPU, and 64 on a GPU, which one leaves idle."""
    return 64 if device.type == "cuda" else 1


def _ran(opened: Opened | OnnxModel, bench: Bench, graph: Path, listener: Listener) -> Ran:
    """How a network is called, and what runs it."""
    place = bench.provider.removeprefix("onnx-")
    if isinstance(opened, Opened) and place == bench.provider:
        device = open_accelerator(place, "fp32").device
        return opened.model.to(device), opened.preprocessing.input_size, device, _torch_on(device)
    if isinstance(opened, Opened):
        size = opened.preprocessing.input_size
        export_onnx(opened.model, graph, input_size=size, metadata={}, outputs=opened.outputs, listener=listener)
        opened = open_onnx(graph)
    opened.device = place
    return opened, opened.input_size, torch.device("cpu"), opened.runtime


def _timings(ran: Sequence[Ran], batch: int, threads: int, seconds: float) -> list[Timing]:
    calls = [(call, noise(batch, size, device)) for call, size, device, _ in ran]
    times = in_turn(calls, seconds=seconds)
    return timings_of(times, batch, [runtime for *_, runtime in ran], threads)


def noise(batch: int, size: tuple[int, ...], device: torch.device) -> Tensor:
    """Inputs that are timed: always the same."""
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(device)


def _share_saved(first: ModelReport, report: ModelReport) -> float | None:
    return None if first.macs is None or report.macs is None else 1 - report.macs / first.macs


def _realised(timing: Timing, saved: float | None) -> Timing:
    """With what of the MACs saved is time saved, where MACs were saved and there is a ratio."""
    if timing.ratio is None or saved is None or saved <= 0:
        return timing
    return timing.model_copy(update={"realised": (1 - timing.ratio) / saved})


def _torch_on(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return f"PyTorch on {name}"


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Inside, PyTorch and the sessions that ONNX Runtime opens take so many threads; how many they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
