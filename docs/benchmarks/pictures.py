"""Pictures of what a run keeps and of what its features look like: kept channels, spectra, kernel complexity.

    python docs/benchmarks/pictures.py --cache CACHE --out RESULTS [--network deit]

Compresses one network of this folder without training by several seeds, which draw the images that it is scored and
refitted on, and with training by one seed for several weights of the kernel term (labels alone, to the last step, as
in kernel_term.py). RESULTS/kept-NETWORK.png shows the share of the seeds that keep a channel,
RESULTS/kernel-NETWORK.png the spectrum of the features before and after and KC while the network is trained. A finished
run is kept below RESULTS and not repeated. matplotlib comes with the extra `dev`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fetch
import matplotlib as mpl
import numpy as np
from common import WEIGHTS, first_images, parser_of
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.config import load_config
from kcrprune.plan import Axis, ChannelPlan
from kcrprune.training.features import feature_covariance
from kcrprune.training.images.sets import open_images
from kcrprune.training.parts import divide

AXES: Mapping[Axis, str] = {
    "mlp_hidden": "hidden channels of the MLP, most kept first",
    "attn_query": "query/key channels of a head, strongest first",
    "attn_value": "value channels of a head, strongest first",
}
WEIGHTS_OF_THE_TERM = (0.0, 0.1, 1.0)
TRAINED: Mapping[str, Any] = {"recover_steps": 240, "lr": 2e-4, "task": "labels", "keep_best": False}
TEST_IMAGES = 2000
log = logging.getLogger("pictures")


@dataclass(frozen=True)
class Bench:
    """The dense network, its images, and where runs are kept."""

    network: str
    data: Path
    out: Path
    target: float

    @property
    def checkpoint(self) -> Path:
        """The dense network."""
        return WEIGHTS / f"{self.network}_cifar10.safetensors"

    def run(self, name: str, **options: Any) -> Path:
        """The folder of a run, which is made if it is not there."""
        folder = self.out / f"{self.network}-{name}"
        if not folder.exists():
            log.info("%s", folder.name)
            kcrprune.compress(
                self.checkpoint, target_flops=self.target, data=str(self.data), out=folder, workers=0, **options
            )
        return folder

    def spectrum(self, path: Path) -> np.ndarray:
        """Eigenvalues of the features' second moment as shares of their sum, on the same calibration images."""
        opened = open_model(path)
        config = load_config(None, None, {"data": str(self.data), "target_flops": self.target})
        images = open_images(config, opened.preprocessing, opened.class_count)
        spectrum = feature_covariance(opened.model.eval(), divide(images, config).calibration).spectrum().numpy()
        return spectrum / spectrum.sum()


def kept_shares(plans: Sequence[ChannelPlan], axis: Axis) -> list[np.ndarray]:
    """For each block, how often each channel is kept over the plans and, where there are heads, over the heads."""
    return [
        np.mean([np.isin(np.arange(kept[0].width), one) for entry in kept for one in entry.channels], axis=0)
        for kept in zip(*plans, strict=True)
        if kept[0].axis == axis
    ]


def draw_kept(plans: Sequence[ChannelPlan], title: str, path: Path) -> None:
    """A heat map for each axis: blocks from top to bottom, channels from left to right."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 0.32 * len(plans[0].blocks) + 2), layout="constrained")
    image = None
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        shares = [np.sort(row)[::-1] if axis == "mlp_hidden" else row for row in kept_shares(plans, axis)]
        widest = max(len(row) for row in shares)
        grid = np.full((len(shares), widest), np.nan)
        for number, row in enumerate(shares):
            grid[number, : len(row)] = row
            panel.text(1.01 * widest, number, f"{row.mean():.0%}", va="center", fontsize=8)
        image = panel.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        panel.set(title=axis, xlabel=label, yticks=range(len(shares)))
        panel.set_yticklabels(plans[0].blocks if panel is panels[0] else [])
    assert image is not None
    figure.colorbar(image, ax=panels, label="share of the seeds (and heads) that keep it", pad=0.03)
    figure.suptitle(f"{title}; at the right of each row the share of the block's channels that stay")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_kernel(spectra: Mapping[str, np.ndarray], courses: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Spectra beside KC over the steps of recovery."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    colours = {label: f"C{number}" for number, label in enumerate(spectra)}
    for label, spectrum in spectra.items():
        left.semilogy(np.arange(1, len(spectrum) + 1), spectrum, colours[label], label=label, linewidth=1.3)
    left.set(title="spectrum of the features", xlabel="number of the eigenvalue", ylabel="share of the trace")
    left.set_ylim(bottom=1e-8)
    for label, course in courses.items():
        right.plot(*zip(*course, strict=True), colours[label], label=label, linewidth=1.3)
    right.set(title="KC of the images of the last steps, while trained", xlabel="step of recovery", ylabel="KC")
    for panel in (left, right):
        _tidy_(panel)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tidy_(panel: Axes) -> None:
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def course_of(run: Path) -> list[tuple[int, float]]:
    """Steps and KC, where the log has it."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["kc"]) for line in lines if "kc" in line]


def main() -> None:
    """Makes the runs and draws both pictures."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mpl.use("agg")
    out = arguments.out.resolve()
    data = first_images(fetch.cifar10(arguments.cache).resolve(), out / "images", TEST_IMAGES)
    bench = Bench(arguments.network, data, out, arguments.target)
    runs = [bench.run(f"seed{seed}", recover_steps=0, seed=seed) for seed in arguments.seeds]
    plans = [ChannelPlan.model_validate(json.loads((run / "plan.json").read_text())) for run in runs]
    title = f"{bench.network} at {bench.target:g} of its MACs, {len(plans)} seeds"
    draw_kept(plans, title, out / f"kept-{bench.network}.png")
    trained = {
        f"recovered, kernel weight {weight:g}": bench.run(f"kernel{weight:g}", kernel_weight=weight, **TRAINED)
        for weight in WEIGHTS_OF_THE_TERM
    }
    networks = {"dense": bench.checkpoint, "cut and refitted": runs[0], **trained}
    spectra = {label: bench.spectrum(path) for label, path in networks.items()}
    courses = {label: course_of(run) for label, run in trained.items()}
    draw_kernel(spectra, courses, out / f"kernel-{bench.network}.png")


if __name__ == "__main__":
    main()
