"""What the order of elimination costs beside one Cholesky inverse of its size, by the inputs of a linear.

    OMP_NUM_THREADS=1 python docs/benchmarks/order.py [--sizes 384x384x6 1536x384x1] [--repeats 5]

A size is inputs x outputs x heads. Inputs, weights and gradients are random, correlated as those of a network are. Both
take turns in one process; of each round the ratio is taken. Times are CPU times of the process, and mean something with
one thread.
"""

import argparse
import sys

import torch
from common import machine_facts
from kernel import cpu_seconds, quartiles
from torch import Tensor

from kcrprune.measure.tables import Table, markdown
from kcrprune.method.innovations import elimination_order

SIZES = ("384x384x6", "1536x384x1", "3072x768x1")  # proj and fc2 of a ViT-S, fc2 of a ViT-B


def problem(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (O, I), covariance (I, I) of the inputs and curvature (O, O)."""
    torch.manual_seed(0)
    mix = torch.randn(inputs, inputs) * (torch.arange(inputs) + 1.0).rsqrt()
    x, gradients = (torch.randn(4 * inputs, inputs) @ mix).double(), torch.randn(2 * outputs, outputs).double()
    return torch.randn(outputs, inputs), x.T @ x / len(x), gradients.T @ gradients


def row(size: str, repeats: int) -> tuple[str, ...]:
    """Median times of both, and the ratio with its quartiles."""
    inputs, outputs, heads = map(int, size.split("x"))
    weight, covariance, curvature = problem(inputs, outputs)
    rounds = [
        (
            cpu_seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(covariance))),
            cpu_seconds(lambda: elimination_order(weight, covariance, curvature, heads=heads)),
        )
        for _ in range(repeats + 1)
    ][1:]
    inverse, order = (quartiles([one[place] for one in rounds])[1] for place in range(2))
    low, middle, high = quartiles([order / inverse for inverse, order in rounds])
    return size, f"{1e3 * inverse:.0f} ms", f"{1e3 * order:.0f} ms", f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measures size by size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = tuple(row(size, arguments.repeats) for size in arguments.sizes)
    told = [f"- {fact}: {value}" for fact, value in (machine_facts() | {"rounds": arguments.repeats}).items()]
    header = ("inputs x outputs x heads", "inverse", "order", "order to inverse")
    sys.stdout.write("\n".join([markdown(Table("The order of a linear", header, rows)), "", *told, ""]))


if __name__ == "__main__":
    main()
