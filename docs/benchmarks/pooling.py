"""Fewer tokens in place of fewer channels: a plain ViT whose patches are pooled 2 x 2 in front of a block.

    OMP_NUM_THREADS=1 python docs/benchmarks/pooling.py --cache CACHE --out RESULTS [--network deit]
        [--ways 1:5 1:4 1:3 1:2 0.5 0.35 0.25 0.2 0.25:5]

A way is a share of the MACs, which channels are cut to by the recipe `no-train`, and a block that patches are pooled
in front of: `0.25:5` does both, `1:5` cuts nothing, `0.25` pools nothing. Everything behind the pooling is refitted by
the tool's closed form and its eight epochs of reconstruction, towards the pooled stream of the dense network, so both
ways are treated alike. No labels. The measures are paired with the dense network on the first test images; times are
CPU times of the process for batches of 64, in turns with the dense network. Rows are kept below RESULTS, and the table
is RESULTS/pooling.md.

Letters: B images, N patches, T tokens, D channels of the stream.
"""

import argparse
import copy
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import fetch
import torch
import torch.nn.functional as F
from common import WEIGHTS, first_images, machine_facts
from images import load_images, normalised
from kernel import cpu_seconds
from peer_methods import Loaded
from peers import write_json
from torch import Tensor, nn

import kcrprune
from kcrprune.config import load_config
from kcrprune.measure.macs import count_macs
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.surgery.normal_equations import Fitted, NormalEquations
from kcrprune.surgery.refit import CLASSIFIER_RIDGE
from kcrprune.training.reconstruct import Reconstruction

SIDE: Final = 2  # of what becomes one patch
TEST_IMAGES, TIMED, ROUNDS = 4000, 64, 9
HEADER = ("channels", "pooled in front of block", "MACs", "time", "top-1", "to dense", "KL to dense, nats")
log = logging.getLogger("pooling")
Streams = list[Tensor]


@dataclass(frozen=True)
class Way:
    """A share of the MACs that channels leave, and the block that patches are pooled in front of."""

    share: float
    block: int | None

    @classmethod
    def of(cls, word: str) -> "Way":
        """As it is given."""
        share, _, block = word.partition(":")
        return cls(float(share), int(block) if block else None)


@dataclass(frozen=True)
class Pooling:
    """(B, T, D) to fewer tokens: means of SIDE x SIDE patches; the tokens in front of them stay."""

    prefix: int
    grid: tuple[int, int]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Means of neighbours."""
        patches = tokens[:, self.prefix :].unflatten(1, self.grid).movedim(-1, 1)  # (B, D, height, width)
        fewer = F.avg_pool2d(patches, SIDE).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, : self.prefix], fewer], dim=1)


class PooledBlock(nn.Module):
    """A block that sees pooled tokens."""

    def __init__(self, block: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.block, self.pooling = block, pooling

    def forward(self, tokens: Tensor, **further: Any) -> Tensor:
        """(B, T, D) to (B, fewer, D)."""
        return self.block(self.pooling(tokens), **further)


@torch.no_grad()
def pooled(dense: Any, cut: Any, block: int, batches: Sequence[Tensor], config: Any) -> nn.Module:
    """`cut` with patches pooled in front of a block, all linears behind that write to the stream refitted."""
    pooling = Pooling(dense.num_prefix_tokens, dense.patch_embed.grid_size)
    wanted = [stream_before(dense, images, block) for images in batches]
    found = [pooling(stream_before(cut, images, block)) for images in batches]
    for ours, theirs in zip(cut.blocks[block:], dense.blocks[block:], strict=True):
        before = found
        for name, writer in (("attn", "attn.proj"), ("mlp", "mlp.fc2")):
            branch = partial(behind, name)
            wanted = [branch(theirs, tokens) for tokens in wanted]
            linear = ours.get_submodule(writer)
            residuals = ([pooling(goal) for goal in wanted], scale(ours, name))
            refit_(linear, partial(branch, ours), found, *residuals, ridge=config.refit_ridge)
            found = [branch(ours, tokens) for tokens in found]
        goals = [pooling(tokens) for tokens in wanted]
        with torch.enable_grad():
            Reconstruction(config.reconstruct_epochs, config.reconstruct_lr, config.seed, "pooling")(
                ours, before, goals
            )
        found = [ours(tokens) for tokens in before]
    refit_heads_(dense, cut, wanted, found, config.refit_ridge)
    cut.blocks[block] = PooledBlock(cut.blocks[block], pooling)
    return cut


def stream_before(network: Any, images: Tensor, block: int) -> Tensor:
    """The tokens in front of a block, (B, T, D)."""
    tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))
    return network.blocks[:block](tokens)


def behind(name: str, block: Any, tokens: Tensor) -> Tensor:
    """The stream behind one of a block's two branches."""
    number = 1 if name == "attn" else 2
    norm, branch, scales = (block.get_submodule(part) for part in (f"norm{number}", name, f"ls{number}"))
    return tokens + scales(branch(norm(tokens)))


def scale(block: Any, name: str) -> Tensor:
    """What a branch's output is multiplied with."""
    layer = block.ls1 if name == "attn" else block.ls2
    return getattr(layer, "gamma", torch.ones(()))


def refit_(
    linear: Any,
    forward: Callable[[Tensor], Tensor],
    streams: Iterable[Tensor],
    goals: Iterable[Tensor],
    scales: Tensor,
    *,
    ridge: float,
) -> None:
    """Brings what `forward` gives, whose last linear this is, nearer to the goals, by a ridge regression."""
    equations = NormalEquations.empty(linear.in_features, linear.out_features, torch.device("cpu"))
    seen: Streams = []
    hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for tokens, goal in zip(streams, goals, strict=True):
        residual = (goal - forward(tokens)) / scales
        equations.add_(seen.pop().flatten(0, -2).double(), residual.flatten(0, -2).double())
    hook.remove()
    Fitted(linear).correct_(equations, ridge)


def refit_heads_(dense: Any, cut: Any, wanted: Streams, found: Streams, ridge: float) -> None:
    """The classifiers on their tokens, towards the dense logits."""
    for token, name in enumerate(("head", "head_dist")):
        if hasattr(cut, name):
            goals = [dense.get_submodule(name)(dense.norm(tokens)[:, token]) for tokens in wanted]
            read = [cut.norm(tokens)[:, token] for tokens in found]
            linear = cut.get_submodule(name)
            refit_(linear, linear, read, goals, torch.ones(()), ridge=CLASSIFIER_RIDGE * ridge)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(images, classes)."""
    return torch.cat([model.eval()(batch) for batch in images.split(200)])


@torch.no_grad()
def time_ratio(dense: nn.Module, model: nn.Module, images: Tensor) -> float:
    """The median over rounds of the time of a batch over that of the dense network."""
    model(images), dense(images)
    pairs = [[cpu_seconds(lambda of=of: of(images)) for of in (model, dense)] for _ in range(ROUNDS)]
    return statistics.median(ours / theirs for ours, theirs in pairs)


class Trial:
    """One dense network, the images that it is measured by, and what its rows share."""

    def __init__(self, network: str, cache: Path, out: Path, count: int) -> None:
        images = fetch.cifar10(cache).resolve()
        self.checkpoint, self.out = WEIGHTS / f"{network}_cifar10.safetensors", out
        data = first_images(images, out / "images", 500)
        self.told = {"data": str(data), "labels": False, "workers": 0, "calibration_images": count}
        self.config = load_config("no-train", None, {"target_flops": 0.5, **self.told})
        self.run = Loaded.of(self.checkpoint, self.config)
        self.dense: Any = self.run.network.dense.eval()
        given = self.run.network.opened.preprocessing
        pixels, self.labels = (part[:TEST_IMAGES] for part in load_images(images / "validation"))
        self.images, self.size = normalised(pixels, given.mean, given.std), given.input_size
        self.wanted = logits_of(self.dense, self.images)

    def network(self, way: Way) -> nn.Module:
        """The dense network with fewer channels, fewer tokens, or both."""
        cut = copy.deepcopy(self.dense)
        if way.share < 1:
            folder = self.out / f"channels-{way.share:g}"
            if not (folder / "run.json").exists():
                asked = {**self.told, "target_flops": way.share, "recipe": "no-train", "bench": False}
                kcrprune.compress(self.checkpoint, out=folder, **asked)
            cut = kcrprune.load(folder)
        batches = list(self.run.pool.parts.calibration)
        return cut if way.block is None else pooled(self.dense, cut, way.block, batches, self.config)

    def row(self, way: Way) -> dict[str, float]:
        """The measures of one way."""
        model = self.network(way).eval()
        got = logits_of(model, self.images)
        right, before = ((logits.argmax(1) == self.labels).double() for logits in (got, self.wanted))
        pair = 100 * (right - before)
        distance = F.kl_div(got.log_softmax(1), self.wanted.log_softmax(1), log_target=True, reduction="batchmean")
        return {
            "macs": count_macs(model, self.size) / self.run.network.cost.dense,
            "time": time_ratio(self.dense, model, self.images[:TIMED]),
            "top1": 100 * float(right.mean()),
            "difference": float(pair.mean()),
            "error": float(pair.std()) / len(pair) ** 0.5,
            "distance": float(distance),
        }


def line(way: Way, row: dict[str, float]) -> tuple[str, ...]:
    """A row of the table."""
    return (
        f"{way.share:g}",
        ABSENT if way.block is None else str(way.block),
        f"{row['macs']:.3f}",
        f"{row['time']:.2f}",
        f"{row['top1']:.2f} %",
        f"{row['difference']:+.2f} ± {row['error']:.2f}",
        f"{row['distance']:.4f}",
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measures way by way, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", default="deit", choices=["deit", "vit"])
    ways = ["1:5", "1:4", "1:3", "1:2", "0.5", "0.35", "0.25", "0.2", "0.25:5"]
    parser.add_argument("--ways", nargs="+", default=ways, help="SHARE, SHARE:BLOCK")
    parser.add_argument("--calibration-images", type=int, default=1024)
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    trial, lines = Trial(given.network, given.cache, given.out.resolve(), given.calibration_images), []
    for word in given.ways:
        path = trial.out / f"{given.network}-{word.replace(':', '-')}.json"
        if not path.exists():
            write_json(path, trial.row(Way.of(word)))
        lines.append(line(Way.of(word), json.loads(path.read_text())))
        log.info("%s", lines[-1])
        facts = [f"- {name}: {value}" for name, value in machine_facts().items()]
        table = markdown(Table("Fewer tokens or fewer channels", HEADER, tuple(lines)))
        (trial.out / "pooling.md").write_text("\n".join([table, "", *facts, ""]))


if __name__ == "__main__":
    main()
