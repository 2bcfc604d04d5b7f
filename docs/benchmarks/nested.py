"""What it costs that the MLPs of a network keep nested sets of the stream's channels, the paper's axis.

    python docs/benchmarks/nested.py deit swin --cache CACHE --out RESULTS --targets 0.7 0.5

Each network beside this script is cut along `mlp_io` alone by Fisher scores, without training: by sets of each MLP's
own, which are gathered, and by nested ones. The measures are the distance to the dense network (KL divergence in nats
an image) on the 512 held-out images, before and after the refit, and agreement on test images. Prints Markdown rows;
images are CIFAR-10, by checksum.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any, Final
from unittest import mock

import fetch
from common import WEIGHTS, first_images, parser_of_several

import kcrprune
from kcrprune.families.contract import Contract

TEST_IMAGES: Final = 2000
ASKED: Final[dict[str, Any]] = {
    "recipe": "no-train",
    "axes": ["mlp_io"],
    "ranking": "fisher",
    "reconstruct_epochs": 0,
    "score_images": 512,
    "calibration_images": 1024,
    "workers": 0,
    "device": "cpu",
    "bench": False,
}


def main() -> None:
    """Prints the rows of the networks that are asked for."""
    parser = parser_of_several(__doc__, [0.7, 0.5])
    arguments = parser.parse_args()
    data = first_images(fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve() / "images", TEST_IMAGES)
    for network in arguments.networks:
        for target in arguments.targets:
            for sets in ("of each MLP's own", "nested"):
                out = arguments.out / f"{network}-{target:g}-{sets.partition(' ')[0]}"
                free = mock.patch.object(Contract, "nested", ()) if sets != "nested" else nullcontext()
                with free:
                    run = kcrprune.compress(
                        WEIGHTS / f"{network}_cifar10.safetensors",
                        data=str(data),
                        target_flops=target,
                        out=out,
                        fresh=True,
                        **ASKED,
                    )
                sys.stdout.write(f"| {network} | {target:g} | {sets} | {row(run)} |\n")
                sys.stdout.flush()


def row(run: Any) -> str:
    """Distances before and after the refit, and agreement."""
    plans = json.loads((run.folder / "run.json").read_text("utf-8"))["decisions"]["plans"]
    accuracy = run.comparison.after.accuracy
    before, after = plans["before_refit"]["scores"], plans["held_out_distillation"]["scores"]
    return f"{before:.4f} | {after:.4f} | {100 * accuracy.agreement:.2f}"


if __name__ == "__main__":
    main()
