"""What the selection of a default run does: does the search's plan win, by how much, and at what price?

    OMP_NUM_THREADS=1 python docs/benchmarks/selection.py --cache CACHE --out RESULTS [--networks deit swin]
        [--targets 0.7 0.5 0.35] [--seeds 42 43 44] [--steps 16] [--kernel-weights 0.1] [--no-labels]

For every network, target and seed the stages of a run up to the one that selects a plan: weights and gates train
together for so many steps, both plans are cut out of what that leaves, refitted on a fourth of the calibration images,
and compared on held-out images, paired. Where the plan of the scores is kept, the run goes on as one without a search
and ends with its very network, so nothing is left to compare. Where that of the search is kept, both runs are made to
their ends and compared on the first test images, paired. What several rows share, the dense network's figures, balance
and scores, is made once and kept below RESULTS, as are finished rows. The table is RESULTS/selection.md.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import fetch
import torch
from common import WEIGHTS, first_images, machine_facts
from peers import write_json
from torch import Tensor, nn

from kcrprune.config import load_config
from kcrprune.events import ignore
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.method.objective import logit_distance
from kcrprune.pipeline.compress import load
from kcrprune.run.context import Context
from kcrprune.run.opening import FromFile, Pool
from kcrprune.run.stage import Results, execute
from kcrprune.run.stages import STAGES
from kcrprune.run.store import Store

TEST_IMAGES = 2000
HEADER = (
    "network", "target", "task", "kernel weight", "steps", "seed", "channels moved", "task loss", "distance", "kept",
    "on test images: loss", "top-1",
)  # fmt: skip
log = logging.getLogger("selection")


@dataclass(frozen=True)
class Cell:
    """One search."""

    network: str
    target: float
    seed: int
    steps: int
    kernel_weight: float
    labels: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What its run is told beyond the defaults; recovery has as many steps again, at least the default's."""
        told = {"target_flops": self.target, "seed": self.seed, "search_steps": self.steps, "labels": self.labels}
        return told | {"kernel_weight": self.kernel_weight, "recover_steps": max(60, 2 * self.steps), "workers": 0}


@dataclass(frozen=True)
class Row:
    """What a search came to; differences are the search's less the scores', with standard errors."""

    selection: dict[str, Any]  # as in a run's record
    test: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the recovered networks, where they differ


def measured(cell: Cell, data: Path, folder: Path) -> Row:
    """The stages of a run up to the selection, and the rest where it matters."""
    folder.mkdir(parents=True, exist_ok=True)
    context, found = run(cell, data, folder, "select")
    selection = context.told().decisions["selection"]
    if not selection["kept"]:
        return Row(selection)
    network, pool = found["open"], found["images"]
    recovered = [recovered_by(cell, data, folder, searching=searching) for searching in (True, False)]
    return Row(selection, compared(network, pool, *recovered))


def run(cell: Cell, data: Path, folder: Path, last: str, **further: Any) -> tuple[Context, Results]:
    """A run up to one of its stages."""
    config = load_config(None, None, {**cell.settings, "data": str(data), **further})
    context = Context(WEIGHTS / f"{cell.network}_cifar10.safetensors", config, ignore)
    names = [stage.name for stage in STAGES]
    stages = STAGES[: names.index(last) + 1]
    return context, execute(stages, context, Store(folder), load(context), wanted=names)


def recovered_by(cell: Cell, data: Path, folder: Path, *, searching: bool) -> nn.Module:
    """The network at the end of a run with a search, or without one."""
    further = {} if searching else {"search_steps": 0}
    _, found = run(cell, data, folder, "recover", **further)
    network, cut, recovery = (found[name] for name in ("open", "cut", "recover"))
    return network.pruned(cut.plan, (recovery or cut).weights)


@torch.no_grad()
def compared(network: FromFile, pool: Pool, ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[float, float]]:
    """What ours adds on test images to loss, top-1 in points, and distance to the dense network, and its error."""
    assert pool.parts.evaluation is not None
    rows = []
    for images, labels in pool.parts.evaluation:
        wanted = network.dense(images)
        rows.append([figures(model.eval()(images), wanted, labels) for model in (ours, theirs)])
    pairs = {name: torch.cat([one[name] - other[name] for one, other in rows]) for name in rows[0][0]}
    return {name: (float(pair.mean()), float(pair.std()) / len(pair) ** 0.5) for name, pair in pairs.items()}


def figures(output: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each image (batch,)."""
    distances = [logit_distance(one[None], other[None]) for one, other in zip(output, wanted, strict=True)]
    return {
        "loss": torch.nn.functional.cross_entropy(output, labels, reduction="none"),
        "top1": 100 * (output.argmax(1) == labels).float(),
        "distance": torch.stack(distances),
    }


def to_table(rows: Mapping[Cell, Row]) -> Table:
    """A line for every search."""
    return Table("Selections", HEADER, tuple(line(cell, row) for cell, row in rows.items()))


def line(cell: Cell, row: Row) -> tuple[str, ...]:
    """Differences with their errors, paired over images."""
    compared = {name: row.selection[name] for name in ("task loss", "distance") if name in row.selection}
    added = {name: told(figure["added"], figure["error"]) for name, figure in compared.items()}
    before = {name: f"{figure['scores']:.4g}, " for name, figure in compared.items()}
    return (
        cell.network,
        f"{cell.target:g}",
        "labels" if cell.labels else "distillation",
        f"{cell.kernel_weight:g}",
        str(cell.steps),
        str(cell.seed),
        f"{row.selection['moved']:,} of {row.selection['channels']:,}",
        *(before[name] + added[name] if name in added else ABSENT for name in ("task loss", "distance")),
        "search" if row.selection["kept"] else "scores",
        *(told(*row.test[name]) if row.test else "the same" for name in ("loss", "top1")),
    )


def told(difference: float, error: float) -> str:
    """With two figures of the error."""
    return f"{difference:+.2g} ± {error:.2g}"


def main(words: Sequence[str] | None = None) -> None:
    """Makes all rows, and the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["deit", "swin"])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.7, 0.5, 0.35])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", nargs="+", type=int, default=[load_config().search_steps])
    parser.add_argument("--kernel-weights", nargs="+", type=float, default=[0.1])
    parser.add_argument("--no-labels", action="store_true")
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    out = given.out.resolve()
    data = first_images(fetch.cifar10(given.cache).resolve(), out / "images", TEST_IMAGES)
    for seed, network, target, steps, weight in product(
        given.seeds, given.networks, given.targets, given.steps, given.kernel_weights
    ):
        cell = Cell(network, target, seed, steps, weight, not given.no_labels)
        path = out / "rows" / f"{'-'.join(map(str, asdict(cell).values()))}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            row = measured(cell, data, out / f"{network}-{seed}")
            log.info("%s", line(cell, row))
            write_json(path, {"cell": asdict(cell), "row": asdict(row)})
        write_table(out)


def write_table(out: Path) -> None:
    """The table of all rows that are there."""
    kept = [json.loads(path.read_text()) for path in (out / "rows").glob("*.json")]
    rows = {Cell(**one["cell"]): Row(**one["row"]) for one in kept}
    order = sorted(rows, key=lambda cell: (cell.network, -cell.target, cell.steps, cell.kernel_weight, cell.seed))
    facts = [f"- {name}: {value}" for name, value in machine_facts().items()]
    table = markdown(to_table({cell: rows[cell] for cell in order}))
    (out / "selection.md").write_text("\n".join([table, "", *facts, ""]))


if __name__ == "__main__":
    main()
