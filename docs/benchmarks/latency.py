"""What a plan for a time is worth beside a plan for MACs that takes the same time.

    python docs/benchmarks/latency.py deit swin --cache CACHE --out RESULTS --targets 0.7 0.5

Each network beside this script is compressed to a share of its MACs without training, and its time is measured; then it
is compressed to that share of the dense time. One thread, whose own processor time counts, so that other work on the
machine disturbs little. Prints Markdown rows; images are CIFAR-10, by checksum.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fetch
import torch
from common import WEIGHTS, first_images, parser_of_several

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.measure import timing
from kcrprune.measure.report import Timing
from kcrprune.pipeline.compress import RunResult
from kcrprune.run import pricing, timed

TEST_IMAGES = 2000


def main() -> None:
    """Prints the rows of the networks that are asked for."""
    parser = parser_of_several(__doc__, [0.7, 0.5])
    parser.add_argument("--batch", type=int, default=8, help="images at once that are timed")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the thread, for each comparison")
    arguments = parser.parse_args()
    count_own_time()
    data = first_images(fetch.cifar10(arguments.cache), arguments.out / "images", TEST_IMAGES)
    for network in arguments.networks:
        for target in arguments.targets:
            for row in compared(network, target, data, arguments):
                sys.stdout.write(row + "\n")
                sys.stdout.flush()


def count_own_time() -> None:
    """From here on one thread works, and its own processor time is what is measured."""
    torch.set_num_threads(1)
    pricing.in_turn = timed.in_turn = partial(timing.in_turn, clock=time.thread_time)  # type: ignore[assignment]


def compared(network: str, target: float, data: Path, arguments: argparse.Namespace) -> list[str]:
    """A row for the share of the MACs, and one for the time that it takes."""
    asked: dict[str, Any] = {
        "data": str(data),
        "recipe": "no-train",
        "reconstruct_epochs": 0,
        "score_images": 512,
        "calibration_images": 1024,
        "workers": 0,
        "device": "cpu",
        "bench": False,
    }
    checkpoint = WEIGHTS / f"{network}_cifar10.safetensors"
    dense = open_model(checkpoint)
    clock = partial(speed, dense.model, dense.preprocessing.input_size, arguments)
    out = arguments.out / f"{network}-{target:g}"
    first = kcrprune.compress(checkpoint, target_flops=target, out=out, **asked)
    took = clock(first)
    assert took.ratio is not None
    share = round(took.ratio, 3)
    asked |= {"target_latency": share, "latency_batch": arguments.batch}
    second = kcrprune.compress(checkpoint, out=out.with_name(f"{out.name}-time"), **asked)
    return [
        row(f"{network} | {target:g} of the MACs", first, took),
        row(f"{network} | {share:g} of the time", second, clock(second)),
    ]


def speed(dense: torch.nn.Module, size: tuple[int, ...], arguments: argparse.Namespace, run: RunResult) -> Timing:
    """How the network of a run compares with the dense one."""
    cut, place = open_model(run.folder).model, torch.device("cpu")
    return timed.speed_of(
        dense, cut, lambda batch: timed.noise(batch, size, place), 0, arguments.seconds, arguments.batch
    )


def row(name: str, run: RunResult, took: Timing) -> str:
    """MACs, time, top-1, agreement and cross-entropy of one network."""
    before, after = run.comparison.before, run.comparison.after
    assert before.accuracy is not None
    assert after.accuracy is not None
    accuracy = after.accuracy
    return (
        f"| {name} | {(after.macs or 0) / (before.macs or 1):.3f} | {took.ratio:.3f} ({took.ratio_low:.3f} to "
        f"{took.ratio_high:.3f}) | {100 * (before.accuracy.top1 or 0):.2f} | {100 * (accuracy.top1 or 0):.2f} | "
        f"{100 * (accuracy.agreement or 0):.2f} | {accuracy.loss:.4f} |"
    )


if __name__ == "__main__":
    main()
