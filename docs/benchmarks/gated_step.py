"""What a step of search or recovery costs beside a plain one of the same network, on the same images.

    OMP_NUM_THREADS=1 python docs/benchmarks/gated_step.py [--networks vit_tiny swin_tiny] [--repeats 10]

Dense: forward and backward pass, all weights trained. Frozen: the same, but no weight wants a gradient, only the stream
behind the patch embedding. Gated: draw of the gates, forward and backward pass with innovations on the default axes and
frozen weights, and the shift to the budget; a gate step of the search without its optimiser and teacher. Recovery:
forward and backward pass with the kernel term, and the watch of its basis, without optimiser and teacher. Weights,
logits and innovations are random, since they cost what learned ones cost. All take turns in one process; of each
round the ratio to the dense step is taken. Times are CPU times of the process, and mean something with one thread.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from common import machine_facts
from kernel import cpu_seconds, quartiles
from torch import Tensor, nn
from train import ARCHITECTURES

from kcrprune.config import RunConfig
from kcrprune.families import build
from kcrprune.measure.macs import count_macs
from kcrprune.measure.tables import Table, markdown
from kcrprune.method.allowed import Allowed
from kcrprune.method.innovations import Innovations
from kcrprune.method.shift import ExpectedMacs
from kcrprune.plan import Architecture
from kcrprune.run.network import allowed_of
from kcrprune.surgery.gated import add_gates_
from kcrprune.surgery.swap import linear_at
from kcrprune.training.features import KernelWatch, feature_covariance
from kcrprune.training.innovations import refitted_readers
from kcrprune.training.losses import make_objective

BATCH = 32
NETWORKS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {  # timm name, and what differs from its defaults
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "deit": ARCHITECTURES["deit"],
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
}


def steps_of(name: str) -> dict[str, Callable[[], None]]:
    """A step of each kind, ready to be timed."""
    torch.manual_seed(0)
    timm_name, arguments = NETWORKS[name]
    side = arguments.get("img_size", 224)
    size = (3, side, side)
    dense = build(Architecture(family="", name=timm_name, arguments=arguments)).train()
    images, config = torch.randn(BATCH, *size), RunConfig()
    allowed = allowed_of(dense, count_macs(dense, size), size, config)
    frozen = copy.deepcopy(dense).requires_grad_(False)
    frozen.get_parameter("patch_embed.proj.bias").requires_grad_(True)
    return {
        "dense": lambda: passes_(dense, images),
        "frozen": lambda: passes_(frozen, images),
        "gated": gate_step(copy.deepcopy(dense).requires_grad_(False), allowed, images, config),
        "recovery": recovery_step(copy.deepcopy(dense), images, config),
    }


def passes_(model: nn.Module, images: Tensor) -> None:
    """Forward and backward pass."""
    model.zero_grad()
    model(images).square().mean().backward()


def gate_step(model: nn.Module, allowed: Allowed, images: Tensor, config: RunConfig) -> Callable[[], None]:
    """The gate step of training/search.py, without loss and optimiser."""
    found = {owner: random_innovations(linear_at(model, owner)) for owner in refitted_readers(allowed.opened)}
    gates = add_gates_(model, allowed.groups, allowed.opened, innovations=found)
    expected, budget = ExpectedMacs(allowed.cost, gates), config.target_flops * allowed.cost.dense
    gates.logits.data.normal_(std=config.search_spread)
    expected.shift_(gates.logits.data, budget)

    def step() -> None:
        gates.logits.grad = None
        gates.sample_(1.0, torch.rand(gates.logits.shape))
        before = gates.logits.detach().clone()
        passes_(model, images)
        change = (gates.logits.detach() - before).abs().max() + config.search_lr  # as far as Adam would go
        expected.shift_(gates.logits.data, budget, 1.01 * change + 1e-6, rounds=5)

    return step


def recovery_step(model: nn.Module, images: Tensor, config: RunConfig) -> Callable[[], None]:
    """The step of training/recover.py, without teacher and optimiser."""
    labels = torch.zeros(len(images), dtype=torch.long)
    by_labels = config.model_copy(update={"task": "labels"})
    objective = make_objective(by_labels, model, labelled=True, outputs="classes")
    start = feature_covariance(model, [images])
    watch = KernelWatch(objective, start, config.kernel_rank, config.kernel_every)

    def step() -> None:
        model.zero_grad()
        loss = objective(model, images, labels)
        loss.total.backward()
        watch.see_(loss.features)

    return step


def random_innovations(linear: nn.Linear) -> Innovations:
    """Those of random inputs in a random order."""
    size = linear.in_features
    inputs = torch.randn(2 * size, size, dtype=torch.float64)
    return Innovations.of(inputs.mean(0), inputs.T @ inputs / (2 * size), torch.randperm(size))


def row(name: str, repeats: int) -> tuple[str, ...]:
    """Median times, and the ratios to the dense step with their quartiles."""
    steps = steps_of(name)
    rounds = [{kind: cpu_seconds(step) for kind, step in steps.items()} for _ in range(repeats + 1)][1:]
    medians = [quartiles([one[kind] for one in rounds])[1] for kind in steps]
    ratios = [quartiles([one[kind] / one["dense"] for one in rounds]) for kind in ("frozen", "gated", "recovery")]
    told = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios]
    return name, *(f"{1e3 * seconds:.0f} ms" for seconds in medians), *told


def main() -> None:
    """Measures network by network and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    rows = tuple(row(name, arguments.repeats) for name in arguments.networks)
    header = (
        "network",
        "dense",
        "frozen",
        "gated",
        "recovery",
        "frozen to dense",
        "gated to dense",
        "recovery to dense",
    )
    facts = machine_facts() | {"images in a batch": BATCH, "rounds": arguments.repeats}
    told = [f"- {fact}: {value}" for fact, value in facts.items()]
    sys.stdout.write(
        "\n".join([markdown(Table("Steps of search and recovery beside a dense step", header, rows)), "", *told, ""])
    )


if __name__ == "__main__":
    main()
