"""Why the defaults are what they are: one option varied at a time, all others at their defaults.

    python docs/benchmarks/defaults.py --cache CACHE --out RESULTS [--network deit] [--parts plan recovery]

Each run is `kcrprune.compress` on CIFAR-10. `plan` varies what happens without training (no search, no recovery),
`reconstruction` adds 8 passes of that, `search` a search of 60 steps, `recovery` the default recovery to its last step.
The measure is the distance to the dense network (KL divergence in nats an image) after cut and refit, and the task loss
after recovery, both on 512 training images that are held out; top-1 on the first 2,000 test images has a standard error
of 0.9 points and decides nothing. A finished run is kept below RESULTS and not repeated.
"""

import json
import logging
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fetch
from common import WEIGHTS, first_images, machine_facts, parser_of, plans_of

import kcrprune
from kcrprune import RunConfig

TEST_IMAGES = 2000  # top-1 is measured on the first of them
log = logging.getLogger("defaults")
PARTS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "plan": {
        "ranking": ("innovation", "fisher", "magnitude", "random"),
        "balance": (True, False),
        "refit": (True, False),
        "tighten_steps": (1, 2, 3),
        "score_images": (128, 256, 512, 1024),
        "calibration_images": (256, 512, 1024, 2048, 4096),
        "refit_ridge": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        "round_to": (1, 4, 8, 16),
        "min_width": (0.01, 0.05, 0.2),
        "axes": (
            ("mlp_hidden", "attn_query", "attn_value"),
            ("mlp_hidden", "attn_query", "attn_value", "mlp_io"),
            ("mlp_hidden", "attn_query", "attn_value", "heads"),
            ("mlp_hidden", "attn_query", "heads"),
            ("mlp_hidden", "attn_query", "attn_value", "mlp_io", "heads"),
        ),
    },
    "reconstruction": {
        "reconstruct_epochs": (0, 2, 4, 8, 16),
        "reconstruct_lr": (1e-4, 3e-4, 1e-3),
        "calibration_images": (1024, 2048, 4096),
    },
    "search": {
        "search_steps": (30, 60, 120),
        "search_lr": (0.02, 0.05, 0.2),
        "search_spread": (1.5, 4.0, 8.0),
        "temperature": (0.5, 1.0, 2.0),
        "temperature_floor": (0.1, 0.3, 1.0),
        "search_weight_lr": (0.0, 2e-5),
    },
    "recovery": {
        "recover_steps": (60, 120, 240),
        "lr": (1e-5, 2e-5, 5e-5, 2e-4),
        "batch_size": (16, 32, 64),
        "weight_decay": (0.0, 0.05),
        "warmup_steps": (0, 10),
        "clip_grad": (0.3, 1.0),
        "keep_best": (True, False),
        "task": ("auto", "labels", "distill"),
        "smoothing": (0.0, 0.1),
        "distill_temperature": (1.0, 2.0),
        "hflip": (0.0, 0.5),
        "kernel_weight": (0.0, 0.1, 1.0),
        "kernel_rank": (0.05, 0.2),
        "kernel_every": (5, 20),
        "kernel_norm": ("relative", "raw"),
    },
}
FIXED: Mapping[str, Mapping[str, Any]] = {
    "plan": {"search_steps": 0, "recover_steps": 0},
    "reconstruction": {"search_steps": 0, "recover_steps": 0, "reconstruct_epochs": 8},
    "search": {"search_steps": 60, "search_weight_lr": 0.0, "search_split": 0.7, "recover_steps": 0},
    "recovery": {"search_steps": 0, "keep_best": False},
}


@dataclass(frozen=True)
class Trial:
    """One run: an option and its value, all others as they are by default in this part."""

    part: str
    option: str
    value: Any
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What compress is told."""
        return {**FIXED[self.part], self.option: self.value, "seed": self.seed}

    @property
    def name(self) -> str:
        """A file name; equal settings have equal names, so the default is run once for a part."""
        differing = {k: v for k, v in self.settings.items() if v != RunConfig.model_fields[k].default}
        return "_".join(f"{k}-{told(v)}" for k, v in sorted(differing.items())) or "default"


def told(value: Any) -> str:
    """A value as a word."""
    return "+".join(value) if isinstance(value, tuple) else str(value)


def trials(parts: list[str], seeds: list[int]) -> Iterator[Trial]:
    """Every run, seed by seed, so that an interrupted sweep is whole for the seeds that it finished."""
    for seed in seeds:
        for part in parts:
            for option, values in PARTS[part].items():
                for value in values:
                    yield Trial(part, option, value, seed)


def figures(trial: Trial, checkpoint: Path, data: Path, target: float, folder: Path) -> dict[str, Any]:
    """What a run found; from its file where it has been run before."""
    kept = folder / f"{trial.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    result = kcrprune.compress(checkpoint, target_flops=target, data=str(data), out=out, **trial.settings)
    decisions = json.loads((out / "run.json").read_text())["decisions"]
    accuracy, recovered = result.comparison.after.accuracy, decisions.get("recover")
    assert accuracy is not None
    found = {
        "distance": plans_of(decisions),
        "held_out": recovered and [recovered["held_out_before"], recovered["held_out_after"]],
        "top1": 100 * (accuracy.top1 or 0),
        "seconds": sum(stage.seconds for stage in result.comparison.stages if not stage.stage.startswith("measure")),
    }
    kept.write_text(json.dumps(found))
    shutil.rmtree(out)
    log.info("%s: %s", trial.name, found)
    return found


def table(part: str, found: Mapping[tuple[str, Any], list[dict[str, Any]]]) -> str:
    """A row for each value of each option, with means over the seeds; the default is marked."""
    lines = [
        "| option | value | distance after refit | task loss, held out | top-1 | seconds |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for (option, value), rows in found.items():
        standard = {**{k: f.default for k, f in RunConfig.model_fields.items()}, **FIXED[part]}[option]
        if option == "ranking" and value == "innovation":  # what `auto` is here
            standard = value
        plan = "search" if part == "search" and "search" in rows[0]["distance"] else "scores"
        distance = f"{statistics.mean(row['distance'][plan] for row in rows):.3g}"
        losses = [row["held_out"] for row in rows if row["held_out"]]
        loss = " to ".join(f"{statistics.mean(pair):.4f}" for pair in zip(*losses, strict=True)) if losses else ""
        top1, seconds = (statistics.mean(row[key] for row in rows) for key in ("top1", "seconds"))
        shown = f"**{told(value)}**" if value == standard else told(value)
        lines.append(f"| `{option}` | {shown} | {distance} | {loss} | {top1:.2f} % | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the sweep and writes the tables after every run."""
    parser = parser_of(__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoint = WEIGHTS / f"{arguments.network}_cifar10.safetensors"
    folder = arguments.out.resolve() / arguments.network
    folder.mkdir(parents=True, exist_ok=True)
    data = first_images(fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve() / "images", TEST_IMAGES)
    found: dict[str, dict[tuple[str, Any], list[dict[str, Any]]]] = {part: {} for part in arguments.parts}
    for trial in trials(arguments.parts, arguments.seeds):
        row = figures(trial, checkpoint, data, arguments.target, folder)
        found[trial.part].setdefault((trial.option, trial.value), []).append(row)
        told = [f"- {name}: {value}" for name, value in machine_facts().items()]
        tables = [f"### {part}\n\n{table(part, rows)}\n" for part, rows in found.items() if rows]
        (arguments.out / f"defaults-{arguments.network}.md").write_text("\n".join([*tables, *told, ""]))


if __name__ == "__main__":
    main()
