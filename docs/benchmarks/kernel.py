"""What the kernel term costs: per training step, at ImageNet's size, and beside Nystrom's approximation.

    OMP_NUM_THREADS=1 python docs/benchmarks/kernel.py --cache CACHE --vit VIT.safetensors --out RESULTS

1. Streams the covariance of as many features as ImageNet-1k has images and takes KC, TNN and effective rank of it.
2. Times steps of search and recovery of the ViT and of the small DeiT in turn: without anything of the kernel, with its
   watch alone (kernel_weight 0), and with the term (kernel_weight 0.1).
3. Compares the separable TNN, with a current basis and with stale ones, with Nystrom's by time and by overstatement.

The tables are RESULTS/kernel.md, the figures RESULTS/kernel.json. Times are CPU times of this process, so other work on
the machine matters less; they mean something with one thread. About a quarter of an hour on one core.

Letters: n images, d features, r rank, m landmarks.
"""

import argparse
import copy
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fetch
import torch
import torch.nn.functional as F
from common import WEIGHTS, machine_facts
from images import load_images, normalised
from torch import Tensor, nn

from kcrprune.artifact.artifact import open_model
from kcrprune.config import RunConfig
from kcrprune.families import FeatureTap
from kcrprune.measure.macs import count_macs
from kcrprune.method.allowed import Allowed
from kcrprune.method.budget import solve
from kcrprune.method.gates import Gates
from kcrprune.method.kernel_complexity import (
    Covariance,
    kernel_complexity,
    rank_for,
    relative_tnn,
    separable_tnn,
    tails,
)
from kcrprune.method.shift import ExpectedMacs
from kcrprune.run.network import allowed_of
from kcrprune.surgery.gated import add_gates_
from kcrprune.surgery.narrow import cut_
from kcrprune.training.features import KernelWatch, feature_covariance
from kcrprune.training.losses import make_objective

IMAGENET = 1_281_167  # training images of ImageNet-1k
WIDTH = 768  # features of a ViT-B
CHUNK = 8192
LANDMARKS = (32, 128, 512)
STALE = (20, 60)  # steps; 20 is the default of kernel_every
Batch = tuple[Tensor, Tensor]
log = logging.getLogger("kernel")


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return quartiles(values)[1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """A quarter, half and three quarters of the values lie below these."""
    found = torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(found[0]), float(found[1]), float(found[2])


def cpu_seconds(action: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def repeated(action: Callable[[], Any], times: int) -> float:
    """Median CPU time of several calls, after one that warms up."""
    action()
    return median([cpu_seconds(action) for _ in range(times)])


# --- 1. at ImageNet's size


def decaying(images: int, features: int, power: float, generator: torch.Generator) -> Tensor:
    """Gaussian features (n, d) whose covariance has the eigenvalues 1 / i^power."""
    scale = torch.arange(1, features + 1).pow(-power / 2)
    return torch.randn(images, features, generator=generator) * scale


def at_imagenet_size(images: int) -> dict[str, float]:
    """CPU seconds of every part, and by how much the process grew."""
    generator = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    covariance, seconds = Covariance.empty(WIDTH), {"generate": 0.0, "stream": 0.0}
    for start in range(0, images, CHUNK):
        clock = time.process_time()
        chunk = decaying(min(CHUNK, images - start), WIDTH, 1.0, generator)
        generated = time.process_time()
        covariance.add_(chunk)
        seconds["generate"] += generated - clock
        seconds["stream"] += time.process_time() - generated
    clock = time.process_time()
    spectrum = covariance.spectrum()
    seconds["spectrum"] = time.process_time() - clock
    clock = time.process_time()
    found = kernel_complexity(spectrum, covariance.images)
    rank = rank_for(0.05, images, WIDTH)
    tnn = float(tails(spectrum)[rank])
    seconds["kc_and_tnn"] = time.process_time() - clock
    seconds["basis"] = cpu_seconds(lambda: covariance.basis(rank))
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    figures = {"kc": found.kc, "h": found.h, "effective_rank": found.effective_rank, "tnn": tnn, "rank": rank}
    return {"images": images, "features": WIDTH, "grown_bytes": grown, "gram_bytes": 4 * images**2} | figures | seconds


# --- 2. on top of a training step


@dataclass
class Network:
    """A dense network, a cut copy, and batches of images with labels as it takes them."""

    name: str
    dense: nn.Module
    pruned: nn.Module
    allowed: Allowed
    config: RunConfig
    inputs: Tensor  # (n, 3, H, W)
    labels: Tensor

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """Batch after batch of the images after the first `skip`, without end."""
        images, labels = self.inputs[skip:], self.labels[skip:]
        while True:
            size = self.config.batch_size
            yield from zip(images.split(size)[:-1], labels.split(size)[:-1], strict=True)


def network(name: str, checkpoint: Path, images: Tensor, labels: Tensor) -> Network:
    """Opens a checkpoint and cuts a copy to the default target by random scores."""
    opened = open_model(checkpoint)
    prepared = opened.preprocessing
    size = prepared.input_size[-2:]
    larger = images.float() if images.shape[-2:] == size else F.interpolate(images.float(), size=size, mode="bicubic")
    config = RunConfig(task="auto", device="cpu", workers=0)
    macs = count_macs(opened.model, prepared.input_size)
    allowed = allowed_of(opened.model, macs, prepared.input_size, config)
    gates = Gates(allowed.opened, torch.device("cpu"))
    plan = solve(allowed, gates.by_group(torch.rand(len(gates.logits))), config.target_flops, name)
    pruned = cut_(copy.deepcopy(opened.model), plan)
    inputs = normalised(larger, prepared.mean, prepared.std)
    return Network(name, opened.model.eval(), pruned, allowed, config, inputs, labels)


class Arm:
    """One way to train: without the kernel's watch, with it, or with the term as well; every step is timed."""

    def __init__(
        self, network: Network, model: nn.Module, start: Covariance, stage: str, *, watched: bool, weight: float
    ) -> None:
        self.network, self.stage = network, stage
        self.config = network.config.model_copy(update={"kernel_weight": weight})
        self.objective = make_objective(self.config, network.dense, labelled=True)
        self.model = copy.deepcopy(model).train()
        self.generator = torch.Generator().manual_seed(0)
        if stage == "search":
            allowed = network.allowed
            self.gates = add_gates_(self.model.requires_grad_(False), allowed.groups, allowed.opened)
            self.expected = ExpectedMacs(allowed.cost, self.gates)
            self.learned = [self.gates.logits]
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.learned, lr=self.config.search_lr)
        else:
            self.learned = list(self.model.parameters())
            self.optimizer = torch.optim.AdamW(self.learned, lr=self.config.lr)
        every = self.config.kernel_every
        self.watch = KernelWatch(self.objective, start, self.config.kernel_rank, every) if watched else None
        self.seconds: list[float] = []

    def step_(self, batch: Batch) -> None:
        """One step of search or recovery, as kcrprune takes it."""
        if self.stage == "search":
            self.gates.sample_(1.0, torch.rand(self.gates.logits.shape, generator=self.generator))
            before = self.gates.logits.detach().clone()
        loss = self.objective(self.model, *batch)
        self.optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, self.config.clip_grad)
        self.optimizer.step()
        if self.stage == "search":
            budget = self.config.target_flops * self.network.allowed.cost.dense
            self.expected.follow_(self.gates.logits.data, before, budget)
        if self.watch is not None:
            self.watch.see_(loss.features)


def step_cost(network: Network, stage: str, rounds: int) -> dict[str, Any]:
    """Times of a step with and without the kernel, and of the kernel's own parts."""
    start = feature_covariance(network.dense, network.inputs[:256].split(32))
    model = network.dense if stage == "search" else network.pruned
    arms = {
        "without": Arm(network, model, start, stage, watched=False, weight=0.0),
        "watch": Arm(network, model, start, stage, watched=True, weight=0.0),
        "term": Arm(network, model, start, stage, watched=True, weight=0.1),
    }
    for number, batch in zip(range(rounds + 1), network.batches(), strict=False):
        for name in sorted(arms, reverse=number % 2 == 1):  # so that no arm always follows the same one
            seconds = cpu_seconds(lambda arm=arms[name], batch=batch: arm.step_(batch))
            if number > 0:
                arms[name].seconds.append(seconds)
    plain = arms["without"].seconds
    differences = {
        name: quartiles([arm - base for arm, base in zip(arms[name].seconds, plain, strict=True)])
        for name in ("watch", "term")
    }
    return {
        "network": network.name,
        "stage": stage,
        "rounds": rounds,
        "step": quartiles(plain),
        "differences": differences,
        "parts": kernel_parts(start, network.config),
        "every": network.config.kernel_every,
    }


def kernel_parts(start: Covariance, config: RunConfig) -> dict[str, float]:
    """CPU seconds of the term with its gradient, of taking in a batch, and of a renewal of the basis with KC."""
    width = len(start.total)
    features = torch.randn(config.batch_size, width, requires_grad=True)
    basis = start.basis(rank_for(config.kernel_rank, start.images, width))
    objective = make_objective(config, nn.Identity(), labelled=True)
    watch = KernelWatch(objective, start, config.kernel_rank, config.kernel_every)
    seen = Covariance.empty(width)
    return {
        "term": repeated(lambda: relative_tnn(features, basis).backward(), 200),
        "accumulate": repeated(lambda: seen.add_(features), 200),
        "renew": repeated(watch.renew_, 20),
    }


# --- 3. beside Nystrom


@dataclass(frozen=True)
class Past:
    """What was known some steps ago: a basis (d, r), and the features (n, d) of the same images where they are kept."""

    name: str
    basis: Tensor
    features: Tensor | None = None


def nystrom_tnn(features: Tensor, rank: int, landmarks: Tensor) -> Tensor:
    """TNN_r of K = F F^T for features (n, d), with eigenvectors by Nystrom's extension from landmarks (m, d).

    Eigenvectors of the landmarks' m x m kernel are extended to all n images by K(images, landmarks) and made
    orthonormal, as a basis has to be. Never below the exact TNN (Ky Fan).
    """
    leading = torch.linalg.eigh(landmarks @ landmarks.T).eigenvectors[:, -rank:]  # (m, r)
    extended = torch.linalg.qr(features @ (landmarks.T @ leading)).Q  # (n, r)
    inside = (features.T @ extended).square().sum()
    return (features.square().sum() - inside) / len(features)


def current_tnn(features: Tensor, rank: int) -> Tensor:
    """The separable TNN with the basis of these features themselves."""
    return separable_tnn(features, Covariance.empty(features.shape[1]).add_(features).basis(rank))


def stepped_tnn(features: Tensor, basis: Tensor) -> Tensor:
    """The separable TNN with a stale basis that one step of subspace iteration brings nearer: O(n d r)."""
    return separable_tnn(features, torch.linalg.qr(features.T @ (features @ basis.to(features))).Q)


def approximations(features: Tensor, rank: int, past: Sequence[Past]) -> list[dict[str, Any]]:
    """Overstatement in percent and CPU seconds of every way to TNN_r of `features` (n, d).

    Nystrom's figures are medians over nine draws of the landmarks.
    """
    exact = float(tails(Covariance.empty(features.shape[1]).add_(features).spectrum())[rank])
    rows = []

    def tell(way: str, actions: Sequence[Callable[[], Tensor]]) -> None:
        value = median([float(action()) for action in actions])
        overstated = 100 * (value / exact - 1)
        rows.append({"way": way, "overstated_percent": overstated, "seconds": repeated(actions[0], 9)})

    tell("separable, basis made for it (covariance, eigenvectors)", [partial(current_tnn, features, rank)])
    for known in past:
        tell(f"separable, {known.name}", [partial(separable_tnn, features, known.basis)])
        tell(f"separable, {known.name}, one power step", [partial(stepped_tnn, features, known.basis)])
    generator = torch.Generator().manual_seed(0)
    for count in LANDMARKS:
        draws = [torch.randperm(len(features), generator=generator)[:count] for _ in range(9)]
        tell(f"Nystrom, {count} landmarks", [partial(nystrom_tnn, features, rank, features[some]) for some in draws])
        for known in past:
            if (old := known.features) is not None:
                ways = [partial(nystrom_tnn, features, rank, old[some]) for some in draws]
                tell(f"Nystrom, {count} landmarks, {known.name.replace('basis', 'their features')}", ways)
    return rows


def synthetic(images: int, width: int) -> dict[str, Any]:
    """Features with a decaying spectrum, whose mixing moves by a hundredth of its norm a step."""
    generator = torch.Generator().manual_seed(0)
    features = decaying(images, width, 1.0, generator)
    rank = rank_for(0.05, images, width)
    mixing, past = torch.eye(width), []
    for age in range(1, max(STALE) + 1):  # back in time from the current features
        noise = torch.randn(width, width, generator=generator)
        mixing = mixing + 0.01 * mixing.norm() * noise / noise.norm()
        if age in STALE:
            old = features @ mixing
            past.append(Past(f"basis of {age} steps ago", Covariance.empty(width).add_(old).basis(rank), old))
    rows = approximations(features, rank, past)
    return {"features": "synthetic", "images": images, "width": width, "rank": rank, "rows": rows}


def trained(network: Network, name: str, model: nn.Module, images: int) -> dict[str, Any]:
    """Features of a network in recovery, with what was known steps ago, and with the basis that recovery works with."""
    start = feature_covariance(model, network.inputs[:images].split(100))
    arm = Arm(network, model, start, "recover", watched=True, weight=0.1)
    rank = rank_for(network.config.kernel_rank, images, len(start.total))
    past: list[Past] = []
    last = max(STALE)
    for step, batch in zip(range(last), network.batches(images), strict=False):
        if last - step in STALE:
            old = features_of(arm.model, network.inputs[:images])
            basis = Covariance.empty(old.shape[1]).add_(old).basis(rank)
            past.append(Past(f"basis of {last - step} steps ago", basis, old))
        if step == last - 1:
            assert arm.objective.basis is not None
            past.append(Past("basis that training has just before it renews it", arm.objective.basis))
        arm.step_(batch)
    features = features_of(arm.model, network.inputs[:images])
    rows = approximations(features, rank, past[::-1])  # the latest first
    return {"features": name, "images": images, "width": features.shape[1], "rank": rank, "rows": rows}


@torch.no_grad()
def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Features (n, d) of all inputs in eval mode; the model is left in training mode."""
    model.eval()
    found = []
    with FeatureTap(model) as tap:
        for batch in inputs.split(100):
            model(batch)
            found.append(tap.take())
    model.train()
    return torch.cat(found)


# --- the tables


def to_markdown(found: dict[str, Any]) -> str:
    """All three tables, and where they were measured."""
    lines = [*told_size(found["imagenet"]), "", *told_steps(found["steps"]), "", *told_ways(found["nystrom"]), ""]
    lines += [f"- {name}: {value}" for name, value in found["circumstances"].items()]
    return "\n".join([*lines, ""])


def told_size(size: dict[str, float]) -> list[str]:
    """The parts of a covariance at ImageNet's size."""
    parts = {
        "draw the features (not part of the method)": f"{size['generate']:.1f} s",
        "stream their covariance": f"{size['stream']:.1f} s",
        "spectrum": f"{size['spectrum']:.3f} s",
        "KC with h, TNN, effective rank": f"{size['kc_and_tnn']:.4f} s",
        f"basis of rank {size['rank']}": f"{size['basis']:.3f} s",
        "peak memory above the start": f"{size['grown_bytes'] / 1e6:.0f} MB",
        "the n x n gram, 4 n^2 bytes in float32, would take": f"{size['gram_bytes'] / 1e12:.1f} TB",
    }
    return [f"| n = {size['images']:,}, d = {size['features']} | |", "|:--|--:|"] + [
        f"| {name} | {value} |" for name, value in parts.items()
    ]


def told_steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The cost on top of a step: by difference between steps, and by its parts."""
    lines = [
        "| network | stage | step without | watch alone adds | watch and term add (quartiles) | term | take in a batch "
        "| renew | parts, renewal spread over its steps |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        step, parts = row["step"][1], row["parts"]
        low, middle, high = (100 * value / step for value in row["differences"]["term"])
        total = parts["term"] + parts["accumulate"] + parts["renew"] / row["every"]
        cells = (
            row["network"],
            row["stage"],
            f"{1e3 * step:.0f} ms",
            f"{100 * row['differences']['watch'][1] / step:+.2f} %",
            f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})",
            *(f"{1e3 * parts[name]:.2f} ms" for name in ("term", "accumulate", "renew")),
            f"{1e3 * total:.2f} ms, {100 * total / step:.2f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def told_ways(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Every way to TNN by overstatement and time."""
    lines = ["| features | n, d, r | way | overstates TNN by | time |", "|:--|:--|:--|--:|--:|"]
    for table in tables:
        sizes = f"{table['images']}, {table['width']}, {table['rank']}"
        lines += [
            f"| {table['features']} | {sizes} | {row['way']} | {row['overstated_percent']:.3f} % "
            f"| {1e3 * row['seconds']:.2f} ms |"
            for row in table["rows"]
        ]
    return lines


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--vit", type=Path, required=True, help="ViT fine-tuned on CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of every kind")
    parser.add_argument("--images", type=int, default=IMAGENET, help="features to stream")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)

    found: dict[str, Any] = {"imagenet": at_imagenet_size(arguments.images)}  # first: memory is counted from here
    log.info("%s", found["imagenet"])
    images, labels = load_images(fetch.cifar10(arguments.cache) / "validation")
    checkpoints = {"vit": arguments.vit, "deit": WEIGHTS / "deit_cifar10.safetensors"}
    networks = [network(name, path, images[:4000], labels[:4000]) for name, path in checkpoints.items()]
    found["nystrom"] = [
        synthetic(2000, 128),
        trained(networks[0], "vit", networks[0].dense, 2000),
        trained(networks[0], "vit, cut by random scores and not refitted", networks[0].pruned, 2000),
    ]
    log.info("%s", found["nystrom"])
    found["steps"] = []
    for each in networks:
        for stage in ("search", "recover"):
            found["steps"].append(step_cost(each, stage, arguments.rounds))
            log.info("%s", found["steps"][-1])
    found["circumstances"] = machine_facts() | {
        "times": "CPU time of the process, batches of 32; the machine did other work as well",
        "images": "CIFAR-10 test images; the features beside Nystrom's are those of the first 2,000",
        "command": "python docs/benchmarks/kernel.py --cache CACHE --vit VIT --out RESULTS",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kernel.json").write_text(json.dumps(found, indent=1))
    (arguments.out / "kernel.md").write_text(to_markdown(found))
    log.info("%s", to_markdown(found))


if __name__ == "__main__":
    main()
