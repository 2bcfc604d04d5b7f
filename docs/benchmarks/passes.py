"""What balance, order, scores, refit and reconstruction cost, in plain forward passes of the dense network.

    OMP_NUM_THREADS=1 python docs/benchmarks/passes.py [--networks vit_tiny] [--images 64] [--target 0.7]

The plain pass runs over the same images, before and after; the mean of both is the unit. Gram matrices belong to the
passes, and algebra (eliminations, decompositions, solves) is told apart, in seconds. Weights and images are random. The
plan is that of the scores. Times are CPU times of the process, and mean something with one thread.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine_facts
from gated_step import NETWORKS
from kernel import cpu_seconds
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.families import build
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.measure.macs import count_macs
from kcrprune.measure.tables import Table, markdown
from kcrprune.method.budget import solve
from kcrprune.plan import Architecture
from kcrprune.run.network import allowed_of
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.narrow import cut_
from kcrprune.surgery.refit import refit_
from kcrprune.training.innovations import innovations_of
from kcrprune.training.reconstruct import Reconstruction
from kcrprune.training.scores import fisher_scores

BATCH = 32


class Course:
    """The stages of a cut, one after the other, each with its CPU time and that of its algebra."""

    def __init__(self, name: str, images: int) -> None:
        torch.manual_seed(0)
        timm_name, arguments = NETWORKS[name]
        side = arguments.get("img_size", 224)
        self.size = (3, side, side)
        self.dense = build(Architecture(family="", name=timm_name, arguments=arguments)).eval()
        self.batches = list(torch.randn(images, *self.size).split(BATCH))
        self.seconds: dict[str, tuple[float, float]] = {}

    def timed(self, stage: str, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `act` returns; its time is kept."""
        found, before = [], ALGEBRA.seconds
        seconds = cpu_seconds(lambda: found.append(act(*arguments, **options)))
        self.seconds[stage] = seconds, ALGEBRA.seconds - before
        return found[0]

    def run_(self, target: float) -> None:
        """From the dense network to the reconstructed one."""
        draw, config = torch.Generator().manual_seed(0), RunConfig()
        allowed = allowed_of(self.dense, count_macs(self.dense, self.size), self.size, config)
        forward(self.dense, self.batches[:1])
        self.timed("plain", forward, self.dense, self.batches)
        model = self.timed("balance", balance_, copy.deepcopy(self.dense), allowed.groups, self.batches)
        found = self.timed("order", innovations_of, model, allowed.opened, self.batches, draw)
        gates = add_gates_(model, allowed.groups, allowed.opened, innovations=found)
        scores = self.timed("score", fisher_scores, model, gates, self.batches, draw)
        remove_gates_(model, gates)
        plan = solve(allowed, scores, target, "random")
        for stage, fit in (("refit", None), ("refit and one epoch", Reconstruction(1, 3e-4, 0, "passes"))):
            pruned = cut_(copy.deepcopy(model), plan)
            self.timed(stage, refit_, pruned, model, allowed.groups, plan, self.batches, fit_block=fit)
        self.timed("plain again", forward, self.dense, self.batches)

    def rows(self) -> list[tuple[str, ...]]:
        """Passes and seconds of algebra by stage."""
        plain = (self.seconds["plain"][0] + self.seconds["plain again"][0]) / 2
        return [
            (stage, f"{(seconds - algebra) / plain:.2f}", f"{algebra:.2f} s", f"{seconds:.1f} s")
            for stage, (seconds, algebra) in self.seconds.items()
        ]


@torch.no_grad()
def forward(model: nn.Module, batches: list[Tensor]) -> None:
    """A plain pass."""
    for batch in batches:
        model(batch)


def main() -> None:
    """Runs network by network and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vit_tiny"], choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--target", type=float, default=0.7)
    arguments = parser.parse_args()
    ALGEBRA.clock = time.process_time
    for name in arguments.networks:
        course = Course(name, arguments.images)
        course.run_(arguments.target)
        table = Table(name, ("stage", "passes", "algebra", "CPU time"), tuple(course.rows()))
        sys.stdout.write(markdown(table) + "\n")
    facts = machine_facts() | {"images": arguments.images, "target": arguments.target}
    sys.stdout.write("\n".join([f"- {fact}: {value}" for fact, value in facts.items()]) + "\n")


if __name__ == "__main__":
    main()
