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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import fetch
import torch
from common import WEIGHTS, first_images, machine_facts, parser_of
from torch import Tensor, nn

from kcrprune.config import load_config
from kcrprune.families import Key
from kcrprune.measure.macs import count_macs
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.method.budget import Scores, solve
from kcrprune.plan import PER_HEAD, ChannelPlan, Kept
from kcrprune.run.network import allowed_of, open_for_run
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.gated import add_gates_
from kcrprune.surgery.narrow import cut_
from kcrprune.surgery.refit import refit_
from kcrprune.training.images.sets import open_images
from kcrprune.training.innovations import innovations_of
from kcrprune.training.parts import divide
from kcrprune.training.randomness import generator
from kcrprune.training.scores import fisher_scores

FACTORS = (1 / 8, 1 / 2, 2, 8)
EXCHANGES = (1 / 16, 1 / 4)  # of the kept or of the dropped channels, whichever are fewer
COUNTED = (
    "move",
    "moves",
    "that leave the plan as it is",
    "lower the test distance",
    "the surest of these",
    "raise it by more than two standard errors",
    "by at most",
    "lower the held-out distance",
    "the best of each group at once: held out",
    "on test images",
)
TEST_IMAGES = 4000
log = logging.getLogger("moves")

Changes = Mapping[Key, float]  # factors, 1 where there is none, or shares that are exchanged, 0 where there is none


@dataclass(frozen=True)
class Move:
    """How much farther from the dense network a changed plan ends, with standard errors; nats an image."""

    name: str
    change: str
    held_out: float
    held_out_error: float
    test: float
    test_error: float


@dataclass(frozen=True)
class Kind:
    """All moves of one kind, how many left the plan as it was, and those that helped, made at once."""

    name: str
    same: int
    moves: list[Move]
    together: Move


class Bench:
    """A dense network, its scores, and the distances of plans made of them."""

    def __init__(self, checkpoint: Path, data: Path, target: float, seed: int) -> None:
        config = load_config("default", None, {"target_flops": target, "data": str(data), "seed": seed})
        opened = open_for_run(checkpoint, config)
        self.dense = opened.model.eval()
        size = opened.preprocessing.input_size
        self.allowed = allowed_of(self.dense, count_macs(self.dense, size), size, config)
        parts = divide(open_images(config, opened.preprocessing, opened.class_count), config)
        self.target, self.name, self.calibration = target, opened.architecture.name, parts.calibration
        self.balanced = copy.deepcopy(self.dense)
        balance_(self.balanced, self.allowed.groups, self.calibration)
        self.scores = self._scored(parts.scoring, seed)
        assert parts.evaluation is not None
        self.images = [[images for images, _ in loader] for loader in (parts.held_out, parts.evaluation)]
        self.dense_logits = [logits(self.dense, images) for images in self.images]

    def _scored(self, images: Sequence[Tensor], seed: int) -> Scores:
        model, labels = copy.deepcopy(self.balanced), generator(seed, "order", 0, "labels")
        found = innovations_of(model, self.allowed.opened, images, labels)
        gates = add_gates_(model, self.allowed.groups, self.allowed.opened, innovations=found)
        return fisher_scores(model, gates, images, generator(seed, "score", 0, "labels"))

    def plan(self, factors: Changes) -> ChannelPlan:
        """What the scores buy once some are multiplied."""
        changed = {key: score * factors.get(key, 1) for key, score in self.scores.items()}
        return solve(self.allowed, changed, self.target, self.name)

    def exchanged(self, plan: ChannelPlan, shares: Changes) -> ChannelPlan:
        """`plan` with the weakest kept channels of some groups given for the strongest that were dropped."""
        entries = (
            swapped(kept, self.scores[kept.key], shares[kept.key]) if kept.key in shares else kept for kept in plan
        )
        return plan.model_copy(update={"groups": tuple(entries)})

    def distances(self, plan: ChannelPlan) -> list[Tensor]:
        """KL divergence of each image, held out and of the test set, after cut and refit."""
        pruned = cut_(copy.deepcopy(self.balanced), plan)
        refit_(pruned, self.balanced, self.allowed.groups, plan, self.calibration)
        ours = [logits(pruned, images) for images in self.images]
        return [(p.exp() * (p - q)).sum(1) for p, q in zip(self.dense_logits, ours, strict=True)]


@torch.no_grad()
def logits(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Log probabilities (images, classes)."""
    return torch.cat([model(batch) for batch in images]).log_softmax(1)


def swapped(kept: Kept, score: Tensor, share: float) -> Kept:
    """As many channels of each head, the weakest of which were dropped; a share of those kept or dropped, at least one.

    The `score` (width,) of an MLP's channels, or (h, width) of those inside heads.
    """
    width = kept.kept_width
    count = max(1, round(share * min(width, kept.width - width))) if width < kept.width else 0
    by_head = score if kept.axis in PER_HEAD else score[None]
    ranked = [by_head[head].argsort(descending=True).tolist() for head in kept.kept_heads]
    channels = tuple(tuple(sorted(one[: width - count] + one[width : width + count])) for one in ranked)
    return kept.model_copy(update={"channels": channels})


def moves(bench: Bench) -> tuple[list[Tensor], list[Kind]]:
    """The distances of the scores' own plan, and every move that changes it."""
    own = bench.plan({})
    base = bench.distances(own)
    exchanged = partial(bench.exchanged, own)
    kinds = [
        tried(bench, "scores of a group", "scores times {:g}", FACTORS, bench.plan, own, base),
        tried(bench, "exchange", "exchange of {:g}", EXCHANGES, exchanged, own, base),
    ]
    return base, kinds


def tried(
    bench: Bench,
    name: str,
    label: str,
    changes: Sequence[float],
    plan_of: Callable[[Changes], ChannelPlan],
    own: ChannelPlan,
    base: Sequence[Tensor],
) -> Kind:
    """Every change of every group, and those together that lowered the held-out distance most in their groups."""
    found, same, helping = [], 0, {}
    for group in bench.scores:
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
    what = f"the best of each of {len(helping)} groups at once"
    return Kind(name, same, found, compared(what, name, base, bench.distances(plan_of(helping))))


def compared(name: str, change: str, base: Sequence[Tensor], distances: Sequence[Tensor]) -> Move:
    """The paired differences of two plans."""
    pairs = [now - before for now, before in zip(distances, base, strict=True)]
    figures = [(float(pair.mean()), float(pair.std()) / len(pair) ** 0.5) for pair in pairs]
    return Move(name, change, *figures[0], *figures[1])


def told(difference: float, error: float) -> str:
    """In units of 1e-4."""
    return f"{1e4 * difference:+.2f} ± {1e4 * error:.2f}"


def counts(kind: Kind) -> tuple[str, ...]:
    """A row of figures about all moves of a kind; differences in units of 1e-4."""
    lower = [move for move in kind.moves if move.test < 0]
    surest = min(lower, key=lambda move: move.test / max(move.test_error, 1e-12), default=None)
    return (
        kind.name,
        str(len(kind.moves) + kind.same),
        str(kind.same),
        str(len(lower)),
        told(surest.test, surest.test_error) if surest else ABSENT,
        str(sum(move.test > 2 * move.test_error for move in kind.moves)),
        f"{1e4 * max((move.test for move in kind.moves), default=0):.1f}",
        str(sum(move.held_out < 0 for move in kind.moves)),
        told(kind.together.held_out, kind.together.held_out_error),
        told(kind.together.test, kind.together.test_error),
    )


def to_markdown(base: Sequence[Tensor], kinds: Sequence[Kind]) -> str:
    """Counts by kind, then all moves, the one that helped most on held-out images first, in units of 1e-4 nats."""
    held_out, test = (float(distance.mean()) for distance in base)
    every = [move for kind in kinds for move in kind.moves]
    rows = [*sorted(every, key=lambda move: move.held_out), *(kind.together for kind in kinds)]
    lines = tuple(
        (move.name, move.change, told(move.held_out, move.held_out_error), told(move.test, move.test_error))
        for move in rows
    )
    summary = Table("Moves by kind", COUNTED, tuple(counts(kind) for kind in kinds))
    whole = Table("All moves", ("group", "change", "held-out distance, 1e-4", "test distance, 1e-4"), lines)
    own = f"The scores' own plan: {held_out:.5f} on held-out images, {test:.5f} on test images."
    return "\n\n".join([own, markdown(summary), markdown(whole)])


def main() -> None:
    """Tries all moves and writes the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = first_images(fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve() / "images", TEST_IMAGES)
    bench = Bench(WEIGHTS / f"{arguments.network}_cifar10.safetensors", images, arguments.target, arguments.seed)
    base, kinds = moves(bench)
    facts = {**machine_facts(), "network": arguments.network, "target": arguments.target, "seed": arguments.seed}
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    name = f"moves-{arguments.network}-{arguments.target:g}"
    (arguments.out / f"{name}.md").write_text("\n".join([to_markdown(base, kinds), "", *lines, ""]))
    (arguments.out / f"{name}.json").write_text(json.dumps([asdict(kind) for kind in kinds], indent=1))


if __name__ == "__main__":
    main()
