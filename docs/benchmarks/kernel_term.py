"""Does the kernel term help? The tool itself, with the term and without it, over seeds and amounts of images.

    python docs/benchmarks/kernel_term.py --cache CACHE --out RESULTS

`grid` compresses one network to one target with plans from the scores alone and from the search, with the kernel term
and without, on all training images, a tenth and a hundredth of them; `strong` adds larger weights of the term. `split`
runs the paper's recipe with different shares of the images for the gates. Recovery of the grid learns from labels alone
and runs to its last step, so that a generalisation term has something to act on; everything else is the tool's default.

Seeds are the outer loop, so a measurement that was ended holds whole grids of fewer seeds. Every finished run leaves
its figures below RESULTS/rows and is not repeated; its folder is deleted. The tables are RESULTS/kernel_term.md, the
figures RESULTS/kernel_term.json; both are written again after each run.
"""

import argparse
import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from time import perf_counter
from typing import Any

import fetch
from common import WEIGHTS, first_images, machine_facts, plans_of
from kernel_tables import GRID, SPLIT, Cell, Row, row_from, to_markdown
from peers import same_protocol, write_json

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.atomic import write_atomically
from kcrprune.config import load_config
from kcrprune.events import ignore
from kcrprune.plan import PER_HEAD, ChannelPlan
from kcrprune.training.evaluate import Evaluation, evaluate
from kcrprune.training.images.sets import open_images
from kcrprune.training.parts import divide

NETWORKS = ("deit", "swin")
SHARES = (1.0, 0.1, 0.01)  # of the training images
STRONGER = "strong"
ON_AND_OFF = (0.0, 0.1)  # weights of the kernel term
STRONG = (1.0, 10.0)  # further ones, for plans of the scores
STRONGEST = 10.0  # on all images alone
SPLITS = (0.8, 0.7, 0.6)
SPLIT_SEEDS = 3
SPLIT_TARGET = 0.5
TEST_IMAGES = 2000
TRAIN_IMAGES = 2000  # at most, of those trained on, to measure the gap
TRAIN_BATCH = 50
EXPLAINED = {
    "top-1 cut": "after cut and refit, before recovery",
    "train": f"up to {TRAIN_IMAGES} of the images that the run trained on (none it held out), not augmented",
    "gap": "top-1 on those less top-1 on test images, in points; of the losses, test less train",
    "KC": "of the features of the calibration images; it depends on their number, so shares do not compare",
    "held-out": "task loss on images that nothing trains on; between plans the distance to the dense network there "
    "decides",
    "recovery": "with labels alone, and to its last step, so that there is an excess over the training images for the "
    "term to act on; by default kcrprune distils and keeps the weights that do best on held-out images",
    "scores": "the kernel term acts in recovery alone there, so its plans are the same with and without it",
    "correlations": "over all runs of a share; chance alone gives about ± 1 / sqrt(runs - 1)",
    "overlap": "Jaccard; channels of attn_query and attn_value are those of each run's own balanced basis, sorted by "
    "strength, so that their first ones are much alike",
}
log = logging.getLogger("kernel_term")


@dataclass(frozen=True)
class Protocol:
    """What is the same for every run."""

    network: str
    target: float
    search_steps: int
    recover_steps: int
    lr: float
    split_steps: int  # of the search and of the recovery in `split`
    calibration_images: int = 512
    score_images: int = 256
    device: str = "cpu"


@dataclass(frozen=True)
class Workbench:
    """The dense network, all images, and where results go."""

    checkpoint: Path
    data: Path
    out: Path

    def images(self, share: float, seed: int, test_images: int = TEST_IMAGES) -> Path:
        """The image folder of a run."""
        whole = first_images(self.data, self.out / "images", test_images)
        if share == 1:
            return whole
        return some_images(whole, self.out / f"images-{share:g}-seed{seed}", share, seed)


@dataclass(frozen=True)
class Bench(Workbench):
    """Further what every run is told."""

    protocol: Protocol

    def row(self, cell: Cell, seed: int) -> Row:
        """The figures of one run, which is made if they are not there."""
        path = self.out / "rows" / f"seed{seed}" / f"{cell.name}.json"
        if not path.exists():
            start = perf_counter()
            row = self._measured(cell, seed)
            write_json(path, asdict(replace(row, seconds=perf_counter() - start)))
            log.info("seed %d, %s: top-1 %.2f in %.0f s", seed, cell.name, row.top1, perf_counter() - start)
        return row_from(json.loads(path.read_text()))

    def _measured(self, cell: Cell, seed: int) -> Row:
        working = self.out / "working"
        shutil.rmtree(working, ignore_errors=True)  # of a run that was ended
        folder = working / "run"
        options = self.options(cell, seed)
        kcrprune.compress(self.checkpoint, out=folder, **options)
        row = read_run(folder, cell, seed, accuracy_in_training(folder, options))
        shutil.rmtree(working)
        return row

    def options(self, cell: Cell, seed: int) -> dict[str, Any]:
        """What a run is told."""
        protocol = self.protocol
        told = {
            "data": str(self.images(cell.share, seed)),
            "seed": seed,
            "workers": 0,  # augmentation then follows from the run's own seed
            "device": protocol.device,
            "calibration_images": protocol.calibration_images,
            "score_images": protocol.score_images,
            "kernel_weight": cell.kernel_weight,
        }
        if cell.part == SPLIT:
            steps = {"search_steps": protocol.split_steps, "recover_steps": protocol.split_steps}
            return told | steps | {"recipe": "paper", "search_split": cell.search_split, "target_flops": SPLIT_TARGET}
        return told | {
            "target_flops": protocol.target,
            "search_steps": protocol.search_steps if cell.method == "search" else 0,
            "search_weight_lr": 0.0,
            "search_split": 0.7,
            "recover_steps": protocol.recover_steps,
            "lr": protocol.lr,
            "task": "labels",
            "keep_best": False,
        }

    def finished(self) -> list[Row]:
        """Every row that RESULTS holds, in the order of the whole grid."""
        order = list(cells((GRID, STRONGER, SPLIT), with_split=True))
        rows = [row_from(json.loads(path.read_text())) for path in (self.out / "rows").glob("*/*.json")]
        return sorted(rows, key=lambda row: (order.index(row.cell), row.seed))


def some_images(data: Path, folder: Path, share: float, seed: int) -> Path:
    """An image folder of links to a share of the training images of every class, and to all test images of `data`.

    What a seed draws for a small share is part of what it draws for a larger one.
    """
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for index, names in enumerate(sorted((data / "train").iterdir())):
        files = sorted(names.iterdir())
        random.Random(f"{seed} {index}").shuffle(files)
        (part / "train" / names.name).mkdir(parents=True)
        for path in files[: max(1, round(share * len(files)))]:
            (part / "train" / names.name / path.name).symlink_to(path.resolve())
    (part / "validation").symlink_to((data / "validation").resolve())
    part.rename(folder)
    return folder


def accuracy_in_training(run: Path, options: Mapping[str, Any]) -> Evaluation:
    """A run's network on images that the run trained on, divided by the run's own code and seed, not augmented."""
    opened = open_model(run)
    few = {"batch_size": TRAIN_BATCH, "calibration_images": 1, "score_images": 1}
    config = load_config(options.get("recipe"), None, {**options, **few})
    images = open_images(config, opened.preprocessing, opened.class_count)
    batches = divide(replace(images, train=images.calibrate), config).training
    return evaluate(opened.model.eval(), list(islice(batches, TRAIN_IMAGES // TRAIN_BATCH)), listener=ignore)


def read_run(folder: Path, cell: Cell, seed: int, training: Evaluation) -> Row:
    """The figures of a run from its folder."""
    report, record, plan = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "run", "plan"))
    before, after, cut, recovery = report["before"], report["after"], report["cut"], record["decisions"]["recover"]
    assert training.top1 is not None
    assert training.loss is not None
    return Row(
        cell=cell,
        seed=seed,
        macs_share=after["macs"] / before["macs"],
        top1_dense=100 * before["accuracy"]["top1"],
        top1_cut=100 * cut["top1"],
        loss_cut=cut["loss"],
        top1=100 * after["accuracy"]["top1"],
        loss=after["accuracy"]["loss"],
        train_images=training.images,
        train_top1=100 * training.top1,
        train_loss=training.loss,
        kernel_before=before["kernel"],
        kernel=after["kernel"],
        held_out_before=recovery["held_out_before"],
        held_out_after=recovery["held_out_after"],
        kept_step=recovery["kept_step"],
        chosen=record["decisions"]["plans"]["chosen"],
        uncorrected=record["decisions"]["plans"]["before_refit"],
        distances=plans_of(record["decisions"]),
        kept=kept_channels(ChannelPlan.model_validate(plan)),
        stages=record["stages"],
        seconds=sum(record["stages"].values()),
        peak_memory_mib=record["peak_memory_mib"],
    )


def kept_channels(plan: ChannelPlan) -> dict[str, dict[str, Any]]:
    """Kept indices by axis and block; for the two attention axes, by head."""
    found: dict[str, dict[str, Any]] = {}
    for kept in plan:
        of_axis = found.setdefault(kept.axis, {})
        for head, channels in zip(kept.kept_heads, kept.channels, strict=True):
            name = f"{kept.block} head {head}" if kept.axis in PER_HEAD else kept.block
            of_axis[name] = {"width": kept.width, "indices": list(channels)}
        if kept.axis in PER_HEAD:
            found.setdefault("heads", {})[kept.block] = {"width": kept.heads, "indices": list(kept.kept_heads)}
    return found


def cells(parts: Sequence[str], *, with_split: bool, shares: Sequence[float] = SHARES) -> Iterator[Cell]:
    """Everything that one seed goes through."""
    weights = {
        "scores": (ON_AND_OFF if GRID in parts else ()) + (STRONG if STRONGER in parts else ()),
        "search": ON_AND_OFF if GRID in parts else (),
    }
    for share, method in product(shares, weights):
        yield from (Cell(GRID, method, share, weight) for weight in weights[method] if weight < STRONGEST or share == 1)
    if SPLIT in parts and with_split:
        for split in SPLITS:
            yield Cell(SPLIT, "paper", 1.0, load_config("paper").kernel_weight, split)


def measure(bench: Bench, seeds: Sequence[int], parts: Sequence[str], shares: Sequence[float]) -> None:
    """All runs, seed after seed; after each the tables of all that RESULTS holds."""
    for number, seed in enumerate(seeds):
        for cell in cells(parts, with_split=number < SPLIT_SEEDS, shares=shares):
            bench.row(cell, seed)
            write_results(bench.out, bench.finished(), bench.protocol)
    log.info("%s", (bench.out / "kernel_term.md").read_text())


def write_results(out: Path, rows: Sequence[Row], protocol: Protocol) -> None:
    """The tables and the figures of the rows so far; kept channels stay in the rows' own files."""
    facts = (
        machine_facts()
        | asdict(protocol)
        | {"target of split": SPLIT_TARGET, "dense top-1": f"{rows[0].top1_dense:.2f} %"}
        | {"images": f"CIFAR-10, 50,000 to train on (share 1), accuracies on the first {TEST_IMAGES} test images"}
        | {f'"{name}"': text for name, text in EXPLAINED.items()}
        | {"command": "python docs/benchmarks/kernel_term.py --cache CACHE --out RESULTS"}
    )
    text = to_markdown(rows, facts)
    write_atomically(out / "kernel_term.md", lambda path: path.write_text(text), replace=True)
    figures = [{name: value for name, value in asdict(row).items() if name != "kept"} for row in rows]
    write_json(out / "kernel_term.json", {"rows": figures, "circumstances": facts})


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--network", default="deit", choices=NETWORKS)
    found.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4))
    found.add_argument("--target", type=float, default=0.35, help="share of the dense MACs in the grid")
    found.add_argument("--shares", nargs="+", type=float, default=SHARES, choices=SHARES, help="of the training images")
    found.add_argument("--parts", nargs="+", default=(GRID, STRONGER, SPLIT), choices=(GRID, STRONGER, SPLIT))
    found.add_argument("--search-steps", type=int, default=60, help="of the grid")
    found.add_argument("--recover-steps", type=int, default=120, help="of the grid")
    found.add_argument("--lr", type=float, default=2e-4, help="of recovery in the grid")
    found.add_argument("--split-steps", type=int, default=100, help="of search and of recovery in the split")
    return found


def main() -> None:
    """Makes the tables."""
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    protocol = Protocol(
        network=arguments.network,
        target=arguments.target,
        search_steps=arguments.search_steps,
        recover_steps=arguments.recover_steps,
        lr=arguments.lr,
        split_steps=arguments.split_steps,
    )
    out = arguments.out.resolve()
    same_protocol(out / "protocol.json", protocol)
    checkpoint = (WEIGHTS / f"{arguments.network}_cifar10.safetensors").resolve()
    bench = Bench(checkpoint, fetch.cifar10(arguments.cache).resolve(), out, protocol)
    measure(bench, arguments.seeds, arguments.parts, arguments.shares)


if __name__ == "__main__":
    main()
