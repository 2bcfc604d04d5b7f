"""Is there anything near the plan of the scores for a search to find? Every block and axis changed, one at a time.

    python docs/benchmarks/moves.py --cache CACHE --out RESULTS [--network deit]

The scores of one axis of one block are multiplied by a factor, the budget is solved anew, and the network is cut and
refitted by the plan that comes of it: the group keeps more or fewer channels, all others pay or gain. Then, at the
widths of the scores' own plan, the weakest kept channels of a group (of each of its heads) are exchanged for the
strongest that it dropped. The measure is the distance to the dense network (KL divergence in nats an image) less that
of the scores' own plan, image by image, on the 512 held-out training images by which a search would decide and on test
images that nothing decides by. Last come the moves of each kind that lowered the held-out distance, all at once, as a
search that takes whatever helps would have them. Moves that leave the plan as it is are counted and not refitted. The
table is RESULTS/moves-NETWORK-TARGET.md, with its figures beside it as JSON.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import fetch
import torch
from common import WEIGHTS, first_images, machine_facts, parser_of
from torch import Tensor, nn

from kcrprune.config import load_config
from kcrprune.measure.macs import count_macs
from kcrprune.method.budget import Purse, Scores, solve
from kcrprune.pipeline.describe import class_count
from kcrprune.pipeline.network import open_for_run, purse_of
from kcrprune.pipeline.parts import divide
from kcrprune.plan import BlockPlan, ChannelPlan, Kept
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.pruned import apply_plan_
from kcrprune.surgery.refit import refit_
from kcrprune.training.data import open_images
from kcrprune.training.innovations import innovations_of
from kcrprune.training.scores import fisher_scores

FACTORS = (1 / 8, 1 / 2, 2, 8)
EXCHANGES = (1 / 16, 1 / 4)  # of the kept or of the dropped channels, whichever are fewer
TOGETHER = "together"
TEST_IMAGES = 4000
log = logging.getLogger("moves")

Group = tuple[str, str]  # block and axis
Changes = Mapping[Group, float]  # factors, 1 where there is none, or shares that are exchanged, 0 where there is none


@dataclass(frozen=True)
class Move:
    """How much farther from the dense network a changed plan ends, with standard errors; nats an image."""

    name: str
    change: str
    held_out: float
    held_out_error: float
    test: float
    test_error: float


class Bench:
    """A dense network, its scores, and the distances of plans made of them."""

    def __init__(self, checkpoint: Path, data: Path, target: float, seed: int) -> None:
        config = load_config("default", None, {"target_flops": target, "data": str(data), "seed": seed})
        opened = open_for_run(checkpoint, config)
        self.dense = opened.model.eval()
        self.purse: Purse = purse_of(self.dense, count_macs(self.dense, opened.preprocessing.input_size), config)
        parts = divide(open_images(config, opened.preprocessing, class_count(self.dense)), config)
        self.target, self.name, self.calibration = target, opened.architecture.name, parts.calibration
        self.balanced = copy.deepcopy(self.dense)
        balance_(self.balanced, self.purse.sites, self.calibration)
        self.scores = self._scored(parts.scoring, config.axes, seed)
        assert parts.evaluation is not None
        self.images = [[images for images, _ in loader] for loader in (parts.held_out, parts.evaluation)]
        self.dense_logits = [logits(self.dense, images) for images in self.images]

    def _scored(self, images: Sequence[Tensor], axes: Sequence, seed: int) -> Scores:
        generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(self.balanced)
        found = innovations_of(model, self.purse.open_axes, self.purse.sites, images, generator)
        gates = add_gates_(model, axes, innovations=found)
        scores = fisher_scores(model, gates, images, generator)
        remove_gates_(model, gates)
        return scores

    def plan(self, factors: Changes) -> ChannelPlan:
        """What the scores buy once some are multiplied."""
        changed = {
            name: {axis: score * factors.get((name, axis), 1) for axis, score in of_axis.items()}
            for name, of_axis in self.scores.items()
        }
        return solve(self.purse, changed, self.target, self.name)

    def exchanged(self, plan: ChannelPlan, shares: Changes) -> ChannelPlan:
        """`plan` with the weakest kept channels of some groups given for the strongest that were dropped."""
        return plan.model_copy(update={"blocks": tuple(self._block(block, shares) for block in plan)})

    def _block(self, block: BlockPlan, shares: Changes) -> BlockPlan:
        found = block
        for (name, axis), share in shares.items():
            if name != block.site:
                continue
            score, kept = self.scores[name][axis], getattr(block, axis)
            if isinstance(kept, Kept):
                new: Kept | tuple[Kept, ...] = swapped(kept, score, share)
            else:
                new = tuple(swapped(one, score[h], share) for h, one in zip(block.heads.indices, kept, strict=True))
            found = found.model_copy(update={axis: new})
        return found

    def distances(self, plan: ChannelPlan) -> list[Tensor]:
        """KL divergence of each image, held out and of the test set, after cut and refit."""
        pruned = apply_plan_(copy.deepcopy(self.balanced), plan)
        refit_(pruned, self.balanced, self.purse.sites, plan, self.calibration)
        ours = [logits(pruned, images) for images in self.images]
        return [(p.exp() * (p - q)).sum(1) for p, q in zip(self.dense_logits, ours, strict=True)]

    def groups(self) -> Iterator[Group]:
        """Every block and open axis."""
        return ((name, axis) for name, of_axis in self.scores.items() for axis in of_axis)


@torch.no_grad()
def logits(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Log probabilities (images, classes)."""
    return torch.cat([model(batch) for batch in images]).log_softmax(1)


def swapped(kept: Kept, score: Tensor, share: float) -> Kept:
    """As many channels, the weakest of which were dropped before; a share of those kept or dropped, at least one."""
    width = len(kept.indices)
    count = max(1, round(share * min(width, kept.width - width))) if width < kept.width else 0
    ranked = score.argsort(descending=True).tolist()
    return Kept(width=kept.width, indices=tuple(sorted(ranked[: width - count] + ranked[width : width + count])))


def moves(bench: Bench) -> tuple[list[Tensor], list[Move], int]:
    """The distances of the scores' own plan, every move that changes it, and how many do not."""
    own = bench.plan({})
    kinds: tuple[tuple[str, Sequence[float], Callable[[Changes], ChannelPlan]], ...] = (
        ("scores times {:g}", FACTORS, bench.plan),
        ("exchange of {:g}", EXCHANGES, partial(bench.exchanged, own)),
    )
    base, found, same = bench.distances(own), [], 0
    for label, changes, plan_of in kinds:
        helping: dict[Group, float] = {}
        for group in bench.groups():
            best = 0.0
            for change in changes:
                plan = plan_of({group: change})
                if plan == own:
                    same += 1
                    continue
                move = compared(" ".join(group), label.format(change), base, bench.distances(plan))
                log.info("%s", move)
                found.append(move)
                if move.held_out < best:
                    best, helping[group] = move.held_out, change
        what = label.split()[0]
        name = f"the best of each of {len(helping)} groups at once"
        found.append(compared(name, f"{what}, {TOGETHER}", base, bench.distances(plan_of(helping))))
    return base, found, same


def compared(name: str, change: str, base: Sequence[Tensor], distances: Sequence[Tensor]) -> Move:
    """The paired differences of two plans."""
    pairs = [now - before for now, before in zip(distances, base, strict=True)]
    figures = [(float(pair.mean()), float(pair.std()) / len(pair) ** 0.5) for pair in pairs]
    return Move(name, change, *figures[0], *figures[1])


def to_markdown(base: Sequence[Tensor], found: Sequence[Move], same: int) -> str:
    """All moves, the one that helped most on held-out images first, in units of 1e-4 nats."""
    held_out, test = (float(distance.mean()) for distance in base)
    lines = [
        f"The scores' own plan: {held_out:.5f} on held-out images, {test:.5f} on test images. {same} moves leave it as "
        "it is.\n",
        "| group | change | held-out distance, 1e-4 | test distance, 1e-4 |",
        "|:--|--:|--:|--:|",
    ]
    for move in sorted(found, key=lambda move: (TOGETHER in move.change, move.held_out)):
        figures = [
            f"{1e4 * difference:+.2f} ± {1e4 * error:.2f}"
            for difference, error in ((move.held_out, move.held_out_error), (move.test, move.test_error))
        ]
        lines.append(f"| {move.name} | {move.change} | {figures[0]} | {figures[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Tries all moves and writes the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = first_images(fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve() / "images", TEST_IMAGES)
    bench = Bench(WEIGHTS / f"{arguments.network}_cifar10.safetensors", images, arguments.target, arguments.seed)
    base, found, same = moves(bench)
    facts = {**machine_facts(), "network": arguments.network, "target": arguments.target, "seed": arguments.seed}
    told = [f"- {name}: {value}" for name, value in facts.items()]
    name = f"moves-{arguments.network}-{arguments.target:g}"
    (arguments.out / f"{name}.md").write_text("\n".join([to_markdown(base, found, same), "", *told, ""]))
    (arguments.out / f"{name}.json").write_text(json.dumps([asdict(move) for move in found], indent=1))


if __name__ == "__main__":
    main()
