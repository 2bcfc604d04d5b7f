"""Where does the kernel term help? Recovery on few images, with the term in many places and beside plainer ways.

    python docs/benchmarks/kernel_where.py --cache CACHE --out RESULTS

The deit is cut once for every seed, with a refit and without, on a hundredth of the training images; the cut network is
then trained on these by labels alone, to the last step, where it overfits: a generalisation term should show there.
Each trial is that training with the term at some weight, rank, cadence and norm, on some features, or with something
else in its place; every trial of a seed sees the same batches. The measure is the loss on test images less that of the
training without the term. A finished trial is kept below RESULTS and not repeated. The table is
RESULTS/kernel_where.md, with its figures beside it as JSON.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import fetch
from common import WEIGHTS, machine_facts
from kernel_tables import mean_and_deviation, paired, with_error
from kernel_term import TRAIN_BATCH, Workbench
from peers import same_protocol, write_json
from torch import Tensor, nn

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.config import load_config
from kcrprune.events import ignore
from kcrprune.families import FeatureTap
from kcrprune.measure.tables import ABSENT, Table, markdown
from kcrprune.training.evaluate import Evaluation, evaluate
from kcrprune.training.features import feature_covariance
from kcrprune.training.images.sets import open_images
from kcrprune.training.losses import make_objective
from kcrprune.training.pace import Pace
from kcrprune.training.parts import divide
from kcrprune.training.precision import open_accelerator
from kcrprune.training.recover import recover_

log = logging.getLogger("kernel_where")
Tap = Callable[[nn.Module], FeatureTap]

WITHOUT = "without the term"
RUIN = "not refitted, without the term"
DISTILLED = "distillation instead"


class PooledTap(FeatureTap):
    """Keeps the output of the middle block, a mean over its tokens, or those of all blocks side by side."""

    def __init__(self, model: nn.Module, *, middle: bool) -> None:
        self._seen: list[Tensor] = []
        blocks = list(_blocks(model))
        chosen = blocks[(len(blocks) - 1) // 2 :][:1] if middle else blocks
        self._hooks = [block.register_forward_hook(self._see_output) for block in chosen]

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.append(output.mean(1))


class TokenTap(FeatureTap):
    """Keeps every token, as a sample of its own, of what one module puts out."""

    def __init__(self, model: nn.Module, module: Callable[[nn.Module], nn.Module]) -> None:
        self._seen: list[Tensor] = []
        self._hooks = [module(_blocks(model)[-1]).register_forward_hook(self._see_output)]

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.append(output.flatten(0, 1))


def _blocks(model: nn.Module) -> nn.Sequential:
    blocks = model.blocks
    assert isinstance(blocks, nn.Sequential)
    return blocks


@dataclass(frozen=True)
class Trial:
    """One training: what recovery is told, the features of the term, and what the network was before."""

    name: str
    told: Mapping[str, Any] = field(default_factory=dict)
    tap: Tap = FeatureTap
    refit: bool = True
    against: str | None = WITHOUT  # the trial that it is compared with; None is one that others are compared with


def with_term(name: str, weight: float = 1.0, tap: Tap = FeatureTap, **told: Any) -> Trial:
    """A trial of the term, on a network that was refitted."""
    return Trial(name, {"kernel_weight": weight, **told}, tap)


TRIALS = (
    Trial(WITHOUT, against=None),
    *(with_term(f"weight {weight:g}", weight) for weight in (0.1, 0.3, 1.0, 3.0)),
    *(with_term(f"weight 1, rank {rank:g}", kernel_rank=rank) for rank in (0.01, 0.2, 0.5)),
    with_term("weight 1, basis renewed every 5 steps", kernel_every=5),
    with_term("weight 1, raw, by the dense network's trace", kernel_norm="raw"),
    with_term("weight 1, tokens of the last block", tap=partial(TokenTap, module=lambda block: block)),
    with_term("weight 1, hidden channels of the last MLP", tap=partial(TokenTap, module=lambda block: block.mlp.act)),
    with_term("weight 1, mean token of the middle block", tap=partial(PooledTap, middle=True)),
    with_term("weight 1, mean tokens of all blocks", tap=partial(PooledTap, middle=False)),
    Trial(RUIN, refit=False, against=None),
    *(Trial(f"not refitted, weight {w:g}", {"kernel_weight": w}, refit=False, against=RUIN) for w in (0.1, 1.0)),
    Trial("half the rate instead", {"lr": 1e-4}),
    Trial("weight decay 0.5 instead", {"weight_decay": 0.5}),
    Trial(DISTILLED, {"task": "distill"}),
    Trial("distillation and weight 1", {"task": "distill", "kernel_weight": 1.0}, against=DISTILLED),
)


@dataclass(frozen=True)
class Protocol:
    """What is the same for every trial."""

    target: float
    share: float
    steps: int
    lr: float = 2e-4
    network: str = "deit"
    test_images: int = 4000
    calibration_images: int = 512
    score_images: int = 256


@dataclass(frozen=True)
class Outcome:
    """What a trial left; losses in nats, accuracies in percent."""

    name: str
    seed: int
    before: Mapping[str, float]  # on test images, before the training
    test: Mapping[str, float]
    train: Mapping[str, float]  # on the images trained on, not augmented
    seconds: float


@dataclass(frozen=True)
class Bench(Workbench):
    """Further what is the same for every trial."""

    protocol: Protocol

    def outcome(self, trial: Trial, seed: int) -> Outcome:
        """The trial's figures, which are measured if they are not there."""
        path = self.out / f"seed{seed}" / f"{trial.name.replace(' ', '_')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(self._measured(trial, seed)))
        return Outcome(**json.loads(path.read_text()))

    def _told(self, seed: int) -> dict[str, Any]:
        protocol = self.protocol
        return {
            "target_flops": protocol.target,
            "data": str(self.images(protocol.share, seed, protocol.test_images)),
            "seed": seed,
            "workers": 0,
            "calibration_images": protocol.calibration_images,
            "score_images": protocol.score_images,
        }

    def _cut(self, seed: int, *, refit: bool) -> Path:
        folder = self.out / f"seed{seed}" / ("refitted" if refit else "cut")
        if not folder.exists():
            kcrprune.compress(self.checkpoint, out=folder, recover_steps=0, refit=refit, **self._told(seed))
        return folder

    def _measured(self, trial: Trial, seed: int) -> Outcome:
        protocol, opened = self.protocol, open_model(self._cut(seed, refit=trial.refit))
        further = {"task": "labels", "keep_best": False, "lr": protocol.lr, "kernel_weight": 0.0} | dict(trial.told)
        config = load_config(None, None, self._told(seed) | further)
        accelerator = open_accelerator("cpu", "fp32")
        model, dense = opened.model.eval(), open_model(self.checkpoint).model.eval()
        images = open_images(config, opened.preprocessing, opened.class_count)
        parts = divide(images, config)
        plain = divide(replace(images, train=images.calibrate), config.model_copy(update={"batch_size": TRAIN_BATCH}))
        assert parts.evaluation is not None
        before = _figures(evaluate(model, parts.evaluation))
        covariance = feature_covariance(model, parts.calibration, trial.tap)
        objective = make_objective(config, dense, labelled=True)
        objective.tap = trial.tap
        if config.kernel_norm == "raw":
            objective.kernel_weight /= float(feature_covariance(dense, parts.calibration).matrix.trace())
        start = perf_counter()
        recover_(
            model, objective, config, accelerator, parts.training.from_step, parts.held_out, covariance,
            pace=Pace(protocol.steps), listener=ignore,
        )  # fmt: skip
        seconds = perf_counter() - start
        test, train = (_figures(evaluate(model, loader)) for loader in (parts.evaluation, plain.training))
        log.info("seed %d, %s: %s in %.0f s", seed, trial.name, test, seconds)
        return Outcome(trial.name, seed, before, test, train, seconds)


def _figures(found: Evaluation) -> dict[str, float]:
    assert found.loss is not None
    assert found.top1 is not None
    return {"loss": found.loss, "top1": 100 * found.top1}


FIGURES: Mapping[str, tuple[str, Callable[[Outcome], float]]] = {  # name -> (format, figure)
    "test loss": ("{:.4f}", lambda found: found.test["loss"]),
    "top-1": ("{:.2f}", lambda found: found.test["top1"]),
    "train loss": ("{:.4f}", lambda found: found.train["loss"]),
    "loss gap": ("{:.4f}", lambda found: found.test["loss"] - found.train["loss"]),
}


def to_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for every trial: its figures, or, ± standard error over seeds, what it adds to the one it stands beside."""
    of = {trial.name: {found.seed: found for found in outcomes if found.name == trial.name} for trial in TRIALS}
    lines = []
    for trial in TRIALS:
        texts = []
        for form, figure in FIGURES.values():
            values = {seed: figure(found) for seed, found in of[trial.name].items()}
            if trial.against is None:
                texts.append(with_error(form, *mean_and_deviation(list(values.values()))) if values else ABSENT)
                continue
            others = {seed: figure(found) for seed, found in of[trial.against].items()}
            seeds, mean, error = paired(values, others)
            texts.append(with_error(form, mean, error, sign="+") if seeds else ABSENT)
        lines.append((trial.name, str(len(of[trial.name])), *texts))
    return Table("Where the kernel term stands", ("recovery", "seeds", *FIGURES), tuple(lines))


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4))
    found.add_argument("--target", type=float, default=0.35)
    found.add_argument("--share", type=float, default=0.01, help="of the training images")
    found.add_argument("--steps", type=int, default=120)
    return found


def main() -> None:
    """Runs all trials seed by seed, and writes the table after each."""
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)
    protocol = Protocol(arguments.target, arguments.share, arguments.steps)
    out = arguments.out.resolve()
    same_protocol(out / "protocol.json", protocol)
    checkpoint = (WEIGHTS / f"{protocol.network}_cifar10.safetensors").resolve()
    bench = Bench(checkpoint, fetch.cifar10(arguments.cache).resolve(), out, protocol)
    found = []
    for seed in arguments.seeds:
        for trial in TRIALS:
            found.append(bench.outcome(trial, seed))
            told = "\n".join(f"- {name}: {value}" for name, value in (machine_facts() | asdict(protocol)).items())
            (out / "kernel_where.md").write_text(f"{markdown(to_table(found))}\n\n{told}\n")
            write_json(out / "kernel_where.json", [asdict(one) for one in found])


if __name__ == "__main__":
    main()
