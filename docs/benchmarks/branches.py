"""What a plan is worth that may take whole branches, beside one that leaves of each a little.

    python docs/benchmarks/branches.py deit swin --cache CACHE --out RESULTS --targets 0.35 0.25 0.2

Each network beside this script is compressed without training to a share of its MACs or of its time, with the smallest
width as it is by default and without one; both are timed against the dense network by one thread's own time. Prints
Markdown rows; images are CIFAR-10, by checksum.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import fetch
from common import WEIGHTS, first_images, parser_of_several
from latency import count_own_time, row, speed

import kcrprune
from kcrprune.artifact.artifact import open_model

TEST_IMAGES = 2000


def main() -> None:
    """Prints the rows of the networks that are asked for."""
    parser = parser_of_several(__doc__, [0.35, 0.25, 0.2])
    parser.add_argument("--widths", type=float, nargs="+", default=[0.05, 0.0], help="smallest ones, of an axis")
    parser.add_argument("--time", action="store_true", help="targets are shares of the time")
    parser.add_argument("--batch", type=int, default=8, help="images at once that are timed")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the thread, for each comparison")
    arguments = parser.parse_args()
    count_own_time()
    data = first_images(fetch.cifar10(arguments.cache), arguments.out / "images", TEST_IMAGES)
    for network in arguments.networks:
        for target in arguments.targets:
            for width in arguments.widths:
                sys.stdout.write(compressed(network, target, width, data, arguments) + "\n")
                sys.stdout.flush()


def compressed(network: str, target: float, width: float, data: Path, arguments: argparse.Namespace) -> str:
    """The row of one run."""
    asked: dict[str, Any] = {
        "data": str(data),
        "recipe": "no-train",
        "reconstruct_epochs": 0,
        "score_images": 128,
        "calibration_images": 512,
        "workers": 0,
        "device": "cpu",
        "bench": False,
        "min_width": width,
    }
    asked |= (
        {"target_latency": target, "latency_batch": arguments.batch} if arguments.time else {"target_flops": target}
    )
    checkpoint = WEIGHTS / f"{network}_cifar10.safetensors"
    out = arguments.out / f"{network}-{'time-' if arguments.time else ''}{target:g}-{width:g}"
    run, dense = kcrprune.compress(checkpoint, out=out, **asked), open_model(checkpoint)
    plan = open_model(out).plan
    assert plan is not None
    took = speed(dense.model, dense.preprocessing.input_size, arguments, run)
    name = f"{network} | {target:g} | {width:g} | {', '.join(sorted(plan.gone)) or 'none'}"
    return row(name, run, took)


if __name__ == "__main__":
    main()
