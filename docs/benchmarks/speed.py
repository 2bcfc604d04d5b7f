"""What plans of the same MACs save in time: `python docs/benchmarks/speed.py vit_tiny_patch16_224 --graphs`.

Random weights and images, Fisher scores, no refit: time depends on widths alone. Dense and cut networks run in turn on
one thread, whose own processor time counts, so that other work on the machine disturbs little. Prints Markdown rows.
With `--mlp-io` the plans are those of the paper's axis: sets of each MLP's own, which are gathered, and nested ones.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import timm
import torch
from torch import Tensor, nn

from kcrprune.families import contract_of
from kcrprune.graphs import export_onnx, open_onnx
from kcrprune.measure.macs import count_macs
from kcrprune.measure.timing import in_turn, timings_of
from kcrprune.method.allowed import Allowed
from kcrprune.method.budget import Scores, solve
from kcrprune.method.cost import MacCost
from kcrprune.plan import Axis, ChannelPlan
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.narrow import cut_
from kcrprune.training.randomness import generator
from kcrprune.training.scores import fisher_scores

SIZE: Final = (3, 224, 224)
DEFAULT: Final[tuple[Axis, ...]] = ("mlp_hidden", "attn_query", "attn_value")
HEADS_BY_16: Final[dict[Axis, int]] = {"attn_query": 16, "attn_value": 16}
SECONDS: Final = 10.0  # of the thread, for each batch size


def main() -> None:
    """Prints the rows of one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--graphs", action="store_true", help="in ONNX Runtime as well")
    parser.add_argument("--mlp-io", action="store_true", help="plans of mlp_io")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(arguments.network).eval()
    cost = MacCost.of(model, contract_of(model, SIZE), count_macs(model, SIZE))
    scores = scored(model, cost, (*DEFAULT, "mlp_io") if arguments.mlp_io else DEFAULT)
    for target in arguments.targets:
        chosen = (plans_of_mlp_io if arguments.mlp_io else plans)(cost, scores, target)
        networks = {"dense": model} | {name: cut_(copy.deepcopy(model), plan).eval() for name, plan in chosen.items()}
        saved = {name: 1 - cost.predicted(plan) / cost.dense for name, plan in chosen.items()}
        with TemporaryDirectory() as folder:
            for runtime, calls in runtimes(networks, Path(folder), graphs=arguments.graphs):
                for batch in (1, 8):
                    for row in rows(calls, batch, saved):
                        sys.stdout.write(f"| {arguments.network} | {target:g} | {runtime} | {batch} | {row}\n")
                        sys.stdout.flush()


def scored(model: nn.Module, cost: MacCost, axes: tuple[Axis, ...]) -> Scores:
    """Fisher scores of all channels of some axes, on random images."""
    gates = add_gates_(model, cost.contract.groups, allowed(cost, axes, 8).opened, innovations={})
    images = [torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    scores = fisher_scores(model, gates, images, generator(0, "score", 0, "labels"), "classes")
    remove_gates_(model, gates)
    return scores


def allowed(cost: MacCost, axes: tuple[Axis, ...], round_to: int | dict[Axis, int]) -> Allowed[MacCost]:
    """What a plan may cut."""
    opened = frozenset(group.key for group in cost.contract.groups if group.axis in axes and not group.whole)
    return Allowed(cost, cost.contract.groups, opened, round_to)


def plans(cost: MacCost, scores: Scores, target: float) -> dict[str, ChannelPlan]:
    """Plans of the same MACs."""
    kinds = {
        "hidden units alone": allowed(cost, ("mlp_hidden",), 8),
        "default": allowed(cost, DEFAULT, 8),
        "default, heads by 16": allowed(cost, DEFAULT, HEADS_BY_16),
    }
    return {name: solve(kind, scores, target, None) for name, kind in kinds.items()}


def plans_of_mlp_io(cost: MacCost, scores: Scores, target: float) -> dict[str, ChannelPlan]:
    """Plans of the same MACs, by the paper's axis and by hidden units."""
    own = allowed(cost, ("mlp_io",), 8)
    kinds = {
        "hidden units alone": allowed(cost, ("mlp_hidden",), 8),
        "mlp_io, gathered": own,
        "mlp_io, first channels": replace(own, nested=cost.contract.nested),
    }
    return {name: solve(kind, scores, target, None) for name, kind in kinds.items()}


Calls = dict[str, Callable[[Tensor], object]]


def runtimes(networks: dict[str, nn.Module], folder: Path, *, graphs: bool) -> Iterator[tuple[str, Calls]]:
    """The networks as each runtime calls them."""
    yield "PyTorch", dict(networks)
    if graphs:
        paths = {name: folder / f"{number}.onnx" for number, name in enumerate(networks)}
        for name, network in networks.items():
            export_onnx(network, paths[name], input_size=SIZE, metadata={}, batch_sizes=(1,))
        yield "ONNX Runtime", {name: open_onnx(path) for name, path in paths.items()}


def rows(calls: Calls, batch: int, saved: dict[str, float]) -> Iterator[str]:
    """Plan, ratio to the dense time with its interval, and time saved for each share of the MACs saved."""
    images = torch.randn(batch, *SIZE)
    times = in_turn([(call, images) for call in calls.values()], seconds=SECONDS, clock=time.thread_time)
    for name, timing in zip(calls, timings_of(times, batch, list(calls), threads=1), strict=True):
        if timing.ratio is not None:
            interval = f"{timing.ratio_low:.2f} to {timing.ratio_high:.2f}"
            yield f"{name} | {timing.ratio:.2f} ({interval}) | {(1 - timing.ratio) / saved[name]:.2f} |"


if __name__ == "__main__":
    main()
