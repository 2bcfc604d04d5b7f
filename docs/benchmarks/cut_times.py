"""How long cut networks take beside the dense one, by one thread's own processor time.

    python docs/benchmarks/cut_times.py DENSE RUN [RUN ...] [--batch 1 8]

All of them are called in turn, so that what slows the machine slows all. Prints a Markdown row for each number of
images at once: the dense network's median, and of each run the ratio to it with its interval of 95 %.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch

from kcrprune.artifact.artifact import open_model
from kcrprune.measure.timing import in_turn, median_interval


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the dense network and runs of it")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=25.0, help="for each number of images at once")
    parser.add_argument("--rounds", type=int, default=300, help="at most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    opened = [open_model(model) for model in given.models]
    for batch in given.batch:
        images = torch.randn(batch, *opened[0].preprocessing.input_size)
        calls = [(each.model.eval(), images) for each in opened]
        dense, *others = in_turn(calls, seconds=given.seconds, most=given.rounds, clock=time.thread_time)
        ratios = " | ".join(told(own, dense) for own in others)
        sys.stdout.write(f"| {batch} | {median(dense):.1f} ms | {ratios} |\n")


def told(own: Sequence[float], dense: Sequence[float]) -> str:
    """The median ratio, and its interval."""
    ratios = [mine / first for mine, first in zip(own, dense, strict=True)]
    low, high = median_interval(ratios)
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
