"""Does a budget that tightens in stages help, each with a search under the kernel term, a cut and a refit?

    python docs/benchmarks/progressive.py --cache CACHE --out RESULTS [--network deit]

For every seed three runs without recovery: the default (one stage, scores alone), the option `tighten_steps` (each
scores what the last one left), and stages each of which also learns gates under the kernel term before its cut. The
measure is the distance to the dense network (KL divergence in nats an image) on the 512 held-out images by which a run
decides. Where there are two plans at the end, the one of the scores and the one of the last search, both are shown. A
finished run is kept below RESULTS and not repeated. The table is RESULTS/progressive-NETWORK-TARGET.md.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import fetch
from common import WEIGHTS, first_images, machine_facts, parser_of, plans_of
from kernel_tables import mean_and_deviation, paired, with_error
from peers import write_json

from kcrprune.config import load_config
from kcrprune.events import ignore
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.pipeline.compress import load
from kcrprune.run import ranking, stages
from kcrprune.run.context import ALL, Context
from kcrprune.run.measuring import Reference
from kcrprune.run.opening import Network, Pool, Weights
from kcrprune.run.ranking import Ranked, Tightened
from kcrprune.run.spending import Budget
from kcrprune.run.stage import execute

TEST_IMAGES = 2000
STAGES = 2
STEPS = 30  # of each search
DEFAULT = "one stage, scores"
WAYS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {"search_steps": 0},
    f"{STAGES} stages, scores": {"search_steps": 0, "tighten_steps": STAGES},
    f"{STAGES} stages, a search in each": {"search_steps": STEPS, "search_weight_lr": 0.0, "tighten_steps": STAGES},
}
log = logging.getLogger("progressive")


def tighten(
    context: Context,
    network: Network,
    pool: Pool,
    reference: Reference,
    budget: Budget,
    balanced: Weights | None,
    ranked: Ranked,
) -> Tightened | None:
    """The stage of a run, which searches before its cut as well where the run searches at the end."""
    settings = context.settings
    if settings.searches and settings.tighten_steps == STAGES:
        context.settings = settings.model_copy(update={"target_flops": settings.target_flops ** (1 / STAGES)})
        found = ranking.search(context, network, pool, reference, balanced, ranked, None)
        context.settings = settings
        assert found is not None, "there are steps to search"
        ranked = Ranked(scores=found.scores, innovations={})
    return ranking.tighten(context, network, pool, budget, balanced, ranked)


AFTER = ("open", "images", "dense", "budget", "balance", "score")
TIGHTEN = replace(stages.TIGHTEN, reads=ALL, after=AFTER, make=tighten)
PROGRESSIVE = tuple(TIGHTEN if stage is stages.TIGHTEN else stage for stage in stages.STAGES[:-1])


def figures(way: str, seed: int, checkpoint: Path, data: Path, target: float, folder: Path) -> dict[str, Any]:
    """What a run found; from its file where it has been run before."""
    kept = folder / f"{way.replace(' ', '_')}-seed{seed}.json"
    if not kept.exists():
        told = {"target_flops": target, "data": str(data), "seed": seed, "recover_steps": 0, **WAYS[way]}
        context, start = Context(checkpoint, load_config(None, None, told), ignore), perf_counter()
        measured = execute(PROGRESSIVE, context, given=load(context), wanted=("measure",))["measure"]
        assert measured.accuracy is not None
        record = context.told()
        found = {
            "distances": plans_of(record.decisions),
            "kept": min(record.decisions["plans"]["held_out_distillation"].values()),
            "searches": len([time for time in record.times if time.stage == "search"]),
            "top1": 100 * (measured.accuracy.top1 or 0),
            "seconds": perf_counter() - start,
        }
        log.info("seed %d, %s: %s", seed, way, found)
        write_json(kept, found)
    return json.loads(kept.read_text())


def to_table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Table:
    """A row for every way: distances of its plans, top-1, and what the kept plan adds to the default's distance."""
    lines = []
    kept = {way: {seed: row["kept"] for seed, row in rows.items()} for way, rows in found.items()}
    for way, rows in found.items():
        texts = [
            with_error("{:.5f}", *mean_and_deviation(values))
            if (values := [row["distances"][plan] for row in rows.values() if plan in row["distances"]])
            else ABSENT
            for plan in ("scores", "search")
        ]
        _, mean, error = paired(kept[way], kept[DEFAULT])
        added = ABSENT if way == DEFAULT else with_error("{:.5f}", mean, error, sign="+")
        top1, seconds = (mean_and_deviation([row[name] for row in rows.values()])[0] for name in ("top1", "seconds"))
        lines.append((way, str(len(rows)), *texts, added, f"{top1:.2f} %", f"{seconds:.0f} s"))
    header = (
        "way",
        "seeds",
        "plan of the scores",
        "plan of the search",
        "kept plan, refitted on all images, to the default",
        "top-1",
        "time",
    )
    return Table("Stages", header, tuple(lines))


def main() -> None:
    """Runs every way seed by seed, and writes the table after each run."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    checkpoint = WEIGHTS / f"{arguments.network}_cifar10.safetensors"
    name = f"progressive-{arguments.network}-{arguments.target:g}"
    folder = arguments.out.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    data = first_images(fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve() / "images", TEST_IMAGES)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    told = [f"- {fact}: {value}" for fact, value in machine_facts().items()]
    for seed in arguments.seeds:
        for way in WAYS:
            found.setdefault(way, {})[seed] = figures(way, seed, checkpoint, data, arguments.target, folder)
            folder.with_name(f"{name}.md").write_text("\n".join([markdown(to_table(found)), "", *told, ""]))


if __name__ == "__main__":
    main()
