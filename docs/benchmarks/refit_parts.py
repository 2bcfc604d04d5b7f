"""What each part of the refit earns: a cut network's distance to the dense one with fewer linears refitted.

    python docs/benchmarks/refit_parts.py --cache CACHE --out RESULTS [--vit VIT.safetensors] [--networks deit swin]

Every run is `kcrprune.compress` by the default recipe without recovery, in which some linears are left as the cut left
them; the last rows refit all and vary the classifier's ridge. The measure is the distance to the dense network (KL
divergence in nats an image) on the 512 held-out images. A finished run is kept below RESULTS and not repeated. The
table is RESULTS/refit_parts.md.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fetch
from common import WEIGHTS, first_images, machine_facts
from peers import write_json

import kcrprune
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.surgery import refit

NETWORKS = ("deit", "swin", "tiny_vit", "vit")
TEST_IMAGES = 500  # nothing is decided by them here
MERGING = "reduction"
READERS = {"qkv", "fc1"}
log = logging.getLogger("refit_parts")


@dataclass(frozen=True)
class Part:
    """What is refitted beside proj and fc2, and the classifier's ridge in ridges of a block."""

    name: str
    readers: bool = True
    classifier: bool = True
    merging: bool = True
    ridge: int = refit.CLASSIFIER_RIDGE

    def takes(self, linear: str) -> bool:
        """Whether the linear of this name is refitted."""
        last = linear.rpartition(".")[2]
        if last in READERS:
            return self.readers
        return self.merging if last == MERGING else self.classifier

    @contextmanager
    def only(self) -> Iterator[None]:
        """While it lasts, the refit does no more than this."""
        whole = refit._Pair.refit_reader_

        def some(pair: Any, fit: Any, *given: Any, **told: Any) -> None:
            if self.takes(fit.name):
                whole(pair, fit, *given, **told)

        with (
            mock.patch.object(refit._Pair, "refit_reader_", some),
            mock.patch.object(refit, "CLASSIFIER_RIDGE", self.ridge),
        ):
            yield


PARTS = (
    Part("proj and fc2, towards the dense stream", readers=False, classifier=False, merging=False),
    Part("and qkv and fc1, towards their own dense outputs", classifier=False, merging=False),
    Part("and the classifier, towards the dense logits", merging=False),
    Part("and the merging of patches: all"),
    Part("all, the classifier's ridge 10 times that of a block", ridge=10),
    Part("all, the classifier's ridge 1,000 times that of a block", ridge=1000),
)


def distance(part: Part, checkpoint: Path, options: Mapping[str, Any], kept: Path) -> float:
    """Of the cut network, after this much of a refit; from its file where it has been run before."""
    if not kept.exists():
        run = kept.with_suffix("")
        shutil.rmtree(run, ignore_errors=True)  # of a run that was ended
        with part.only():
            kcrprune.compress(checkpoint, out=run, recover_steps=0, **options)
        decisions = json.loads((run / "run.json").read_text())["decisions"]
        write_json(kept, decisions["plans"]["held_out_distillation"]["scores"])
        log.info("%s: %s", kept, kept.read_text())
        shutil.rmtree(run)
    return json.loads(kept.read_text())


def to_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each part, a column for each network."""
    names = [part.name for part in PARTS]
    lines = [
        (name, *(f"{of[name]:.4f}" if name in of else ABSENT for of in found.values()))
        for name in names
        if any(name in of for of in found.values())
    ]
    return Table("What each part of the refit earns", ("refitted", *found), tuple(lines))


def main() -> None:
    """Measures network by network, and writes the table after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vit", type=Path, help="the ViT fine-tuned on CIFAR-10; left out without it")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--target", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    out = arguments.out.resolve()
    data = first_images(fetch.cifar10(arguments.cache).resolve(), out / "images", TEST_IMAGES)
    options = {"target_flops": arguments.target, "data": str(data), "seed": arguments.seed}
    told = [f"- {name}: {value}" for name, value in (machine_facts() | {"seed": arguments.seed}).items()]
    found: dict[str, dict[str, float]] = {}
    for network in arguments.networks:
        checkpoint = arguments.vit if network == "vit" else WEIGHTS / f"{network}_cifar10.safetensors"
        if checkpoint is None:
            continue
        for number, part in enumerate(PARTS):
            if network != "swin" and part is PARTS[3]:  # there is no merging, so it is the part before
                continue
            kept = out / f"{network}-{arguments.target:g}-seed{arguments.seed}-part{number}.json"
            found.setdefault(network, {})[part.name] = distance(part, checkpoint.resolve(), options, kept)
            (out / "refit_parts.md").write_text("\n".join([markdown(to_table(found)), "", *told, ""]))


if __name__ == "__main__":
    main()
