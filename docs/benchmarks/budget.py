"""How near the budget solver comes to its target on every timm network that kcrprune can cut.

    python docs/benchmarks/budget.py --out RESULTS [--names 'swin_*']

Tries every name of the timm files whose networks may be of a class that a family covers. Networks are built on the
meta device, without weights; scores are random, MACs are those of torch's own counter, and the plan's MACs are
predicted. After each network, RESULTS/budget.json has all figures so far and RESULTS/budget.md the table: for every
kind of network and target how many reach it, how many plans lie in the window, and the worst gap; then, one by one,
what misses and why. About twenty minutes on one core.
"""

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from common import machine_facts
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.config import RunConfig
from kcrprune.errors import BudgetError, UnsupportedModelError
from kcrprune.families import contract_of, family_of, outlining
from kcrprune.method.budget import WINDOW, Scores, solve
from kcrprune.method.cost import MacCost
from kcrprune.method.gates import Gates
from kcrprune.plan import AXES, Axis
from kcrprune.run.network import opened_groups

TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
KINDS = {  # a timm file, and what its networks are called in the table
    "vision_transformer": "ViT",
    "vision_transformer_hybrid": "ViT behind convolutions",
    "vitamin": "ViT behind convolutions",
    "deit": "DeiT",
    "swin_transformer": "Swin",
    "swin_transformer_v2": "Swin V2",
    "eva": "EVA, DINOv3 and other rotary ViTs",
}
log = logging.getLogger("budget")


@dataclass
class Result:
    """What became of one name: refused, or a gap for each target that is not out of reach."""

    name: str
    kind: str
    refused: str | None = None
    macs: int = 0
    axes: tuple[Axis, ...] = ()
    floor: float = 0.0  # smallest share of the dense MACs that the axes reach
    channel: float = 0.0  # share of the cheapest channel of an open axis, or pair that goes together
    gaps: dict[float, float] = field(default_factory=dict)  # target minus the plan's share
    seconds: float = 0.0  # of the solver, all targets together

    @property
    def misses(self) -> dict[float, float]:
        """Gaps outside the window."""
        return {target: gap for target, gap in self.gaps.items() if not 0 <= gap < WINDOW}


def measured(name: str, kind: str) -> Result:
    """Builds one network on the meta device and solves for every target."""
    try:
        with outlining():
            model = timm.create_model(name).eval()
        family_of(model)
    except (UnsupportedModelError, RuntimeError, NotImplementedError) as error:
        return Result(name, kind, refused=str(error))
    size = resolve_model_data_config(model)["input_size"]
    macs = meta_macs(model, size)
    cost = MacCost.of(model, contract_of(model, size), macs)
    allowed = opened_groups(cost, RunConfig())
    axes = tuple(axis for axis in AXES if any(group.axis == axis for group in allowed.opened))
    cheapest = min(cost.channel(group) for group in allowed.opened)
    result = Result(name, kind, None, macs, axes, allowed.floor() / macs, cheapest / macs)
    scores = random_scores(Gates(allowed.opened, torch.device("cpu")))
    start = time.monotonic()
    for target in TARGETS:
        try:
            plan = solve(allowed, scores, target, name)
        except BudgetError:
            continue
        result.gaps[target] = target - cost.predicted(plan) / macs
    result.seconds = time.monotonic() - start
    return result


def meta_macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """MACs of one image of this size (C, H, W), by torch's counter; one MAC is two of its FLOPs."""
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:  # its module tracker wants gradients
        model(torch.zeros(1, *size, device="meta"))
    return counter.get_total_flops() // 2


def random_scores(gates: Gates) -> Scores:
    """Log-normal scores of every gate."""
    return gates.by_group(torch.randn(len(gates.logits), generator=torch.Generator().manual_seed(0)).mul(2).exp())


def to_markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The table by kind and target, what misses, and where it was measured."""
    cut = [result for result in results if result.refused is None]
    lines = [
        "| networks | target | reach it | in the window | worst gap | median gap | where the worst |",
        "|:--|--:|--:|--:|--:|--:|:--|",
    ]
    for kind in dict.fromkeys(result.kind for result in cut):
        lines += [row(kind, target, [result for result in cut if result.kind == kind]) for target in TARGETS]
    lines += [row("all", target, cut) for target in TARGETS]
    lines += ["", *told_misses(cut), ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*lines, ""])


def row(kind: str, target: float, results: Sequence[Result]) -> str:
    """One line of the table."""
    reached = sorted((result for result in results if target in result.gaps), key=lambda result: result.gaps[target])
    if not reached:
        return f"| {kind} | {target} | 0 of {len(results)} | | | | |"
    inside = sum(target not in result.misses for result in reached)
    worst, median = reached[-1], reached[len(reached) // 2]
    gaps = f"{worst.gaps[target]:.5f} | {median.gaps[target]:.5f}"
    return f"| {kind} | {target} | {len(reached)} of {len(results)} | {inside} | {gaps} | {worst.name} |"


def told_misses(results: Sequence[Result]) -> list[str]:
    """A line for each network that misses the window or a target."""
    lines = [
        f"- {result.name} misses at "
        + ", ".join(f"{target} (gap {gap:.5f})" for target, gap in result.misses.items())
        + f": its cheapest channel is {result.channel:.5f} of its MACs"
        for result in results
        if result.misses
    ]
    for result in results:
        beyond = [f"{target}" for target in TARGETS if target not in result.gaps]
        if beyond:
            floor = math.ceil(1000 * result.floor) / 1000
            names, refused = ", ".join(result.axes), ", ".join(beyond)
            lines.append(f"- {result.name}: {floor:.3f} is the least with {names}; refused at {refused}")
    return lines


def main() -> None:
    """Measures all names and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="*")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = [(name, kind) for file, kind in KINDS.items() for name in timm.list_models(arguments.names, module=file)]
    results: list[Result] = []
    start = time.monotonic()
    for name, kind in names:
        results.append(measured(name, kind))
        refused = sum(result.refused is not None for result in results)
        facts = machine_facts() | {
            "networks": f"{len(results)} of {len(names)} names tried, {refused} refused by every family",
            "seconds": f"{time.monotonic() - start:.0f}, {sum(result.seconds for result in results):.0f} in the solver",
            "command": "python docs/benchmarks/budget.py --out RESULTS",
        }
        (arguments.out / "budget.md").write_text(to_markdown(results, facts))
        found = {"results": [asdict(result) for result in results], "circumstances": facts}
        (arguments.out / "budget.json").write_text(json.dumps(found, indent=1))
        log.info("%s: %s", name, results[-1].refused or f"worst gap {max(results[-1].gaps.values(), default=0):.5f}")
    log.info("%s", (arguments.out / "budget.md").read_text())


if __name__ == "__main__":
    main()
