"""One row of peers.py, measured: prune, test, recover with the project's own objective, test again, export and time."""

import copy
import hashlib
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import peer_closed_form
import peer_methods
import peer_tokens
import torch
from peer_methods import Loaded, NotReachedError, Task
from peer_table import DENSE, Protocol, Recovery, Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kcrprune.atomic import write_atomically
from kcrprune.config import RunConfig
from kcrprune.errors import KcrPruneError
from kcrprune.events import ignore
from kcrprune.graphs import export_onnx, open_onnx
from kcrprune.measure.macs import count_parameters
from kcrprune.measure.timing import in_turn
from kcrprune.training.features import feature_covariance
from kcrprune.training.losses import make_objective
from kcrprune.training.pace import Pace
from kcrprune.training.recover import recover_

BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
ROUNDS = 100  # of timing; the median of the rounds counts
Figures = dict[str, Any]
METHODS = peer_methods.METHODS | peer_closed_form.METHODS | peer_tokens.METHODS


class Recalled:
    """The dense network, which computes the logits of a batch once for all rows; a batch is known by its values."""

    def __init__(self, network: nn.Module, path: Path) -> None:
        self.network = network.eval()
        self.path = path
        self.known = load_file(path) if path.exists() else {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        key = hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        if key not in self.known:
            self.known[key] = self.network(images)
        return self.known[key]

    def save(self) -> None:
        """Keeps what is known for the rows to come."""
        write_atomically(self.path, lambda path: save_file(self.known, path), replace=True)


@dataclass(frozen=True)
class Bench:
    """What a network's rows share: the loaded run, images, protocol, and the folder of the network's results."""

    run: Loaded
    checkpoint: Path
    fit_data: Path  # what methods work on: all training images, and few test images
    protocol: Protocol
    folder: Path
    dense: Recalled

    @classmethod
    def open(cls, checkpoint: Path, data: Path, fit_data: Path, protocol: Protocol, folder: Path) -> "Bench":
        """Loads a network and the images; `data` holds the test images that count."""
        config = RunConfig(
            target_flops=1.0,
            data=str(data),
            seed=protocol.seed,
            batch_size=protocol.batch_size,
            workers=0,
            device="cpu",
            kernel_weight=0.0,  # a narrower residual stream has other features, so the term is not the same for all
        )
        run = Loaded.of(checkpoint, config)
        dense = Recalled(run.network.dense, folder / "dense_logits.safetensors")
        return cls(run, checkpoint, fit_data, protocol, folder, dense)

    def row(self, network: str, target: float, method: str) -> Row:
        """The row with everything that was reached; what ended it is in words."""
        row = Row(network, target, method, dense_macs=self.run.network.cost.dense)
        steps = (
            self._dense()
            if method == DENSE
            else self._pruned(Task(self.run, self.checkpoint, self.fit_data, target), method)
        )
        try:
            for figures in steps:
                row = replace(row, **figures)
        except Exception as error:  # a peer's own, of any kind; it belongs into the table
            row = replace(row, failure=sentence(error))
        return replace(row, peak_mb=peak_mb())

    def _dense(self) -> Iterator[Figures]:
        """The dense network's figures; its logits are computed here on all that the other rows will show it."""
        model = self.run.network.dense.eval()
        yield {"macs": self.run.network.cost.dense, "parameters": count_parameters(model)}
        top1 = 100 * float(self.hits(self.dense).float().mean())
        yield {"top1_before": top1, "top1": top1}
        for batches in (islice(self.run.pool.parts.training, self.protocol.steps), self.run.pool.parts.held_out):
            for images, _ in batches:
                self.dense(images)
        self.dense.save()
        yield {"latency_ms": self._latencies(self._exported(model, DENSE))[0]}

    def _pruned(self, task: Task, method: str) -> Iterator[Figures]:
        pruned = METHODS[method](task)
        yield {"prune_seconds": pruned.seconds, "prune_peak_mb": peak_mb()}
        yield {"prune_passes": pruned.seconds / self._pass_seconds()}
        macs = task.macs(pruned.model)
        yield {"macs": macs, "parameters": count_parameters(pruned.model)}
        if macs > task.limit:
            raise NotReachedError(f"it leaves {macs:,} MACs, above {task.limit:,}")
        yield {"top1_before": 100 * float(self.hits(pruned.model).float().mean())}
        if self.protocol.steps == 0:  # the cut alone
            yield self._compared(pruned.model)
            return
        rates = self.protocol.scratch_rates if method == "scratch" else self.protocol.rates
        model, best, recoveries = self._recovered(pruned.model, rates)
        yield {"recoveries": recoveries, "rate": best.rate, "recover_seconds": best.seconds}
        yield self._compared(model)
        dense, own = self._latencies(self.folder / f"{DENSE}.onnx", self._exported(model, f"{method}-{task.target:g}"))
        yield {"latency_dense_ms": dense, "latency_ms": own}

    @torch.no_grad()
    def _pass_seconds(self) -> float:
        """Of one pass of the dense network over the calibration images."""
        start = perf_counter()
        for images in self.run.pool.parts.calibration:
            self.run.network.dense(images)
        return perf_counter() - start

    @torch.no_grad()
    def hits(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Which test images a network names rightly, (images,)."""
        found = []
        for images, labels in self._test_images():
            logits = network(images)
            if not bool(logits.isfinite().all()):
                raise NotReachedError("the network's logits are not finite")
            found.append(logits.argmax(1) == labels)
        return torch.cat(found)

    def _test_images(self) -> Iterable[tuple[Tensor, Tensor]]:
        assert self.run.pool.parts.evaluation is not None, "CIFAR-10 has test images"
        return self.run.pool.parts.evaluation

    def _compared(self, model: nn.Module) -> Figures:
        """Top-1 after recovery, and the paired difference to the dense network with its standard error."""
        own = self.hits(model).double()
        points = 100 * (own - self.hits(self.dense).double())
        error = float(points.std()) / len(points) ** 0.5
        return {"top1": 100 * float(own.mean()), "difference": float(points.mean()), "difference_error": error}

    def _recovered(self, pruned: nn.Module, rates: Iterable[float]) -> tuple[nn.Module, Recovery, tuple[Recovery, ...]]:
        """Trains a copy with each rate on the same batches; the one with the lowest held-out loss, and what all did."""
        covariance = feature_covariance(
            self.run.network.dense, self.run.pool.parts.calibration[:1]
        )  # of no effect at kernel weight 0
        trained: list[tuple[nn.Module, Recovery]] = []
        for rate in rates:
            model, config = copy.deepcopy(pruned), self.run.context.config.model_copy(update={"lr": rate})
            objective = make_objective(config, self.dense, labelled=self.run.pool.images.labelled)  # type: ignore[arg-type]
            start = perf_counter()
            found = recover_(
                model,
                objective,
                config,
                self.run.context.accelerator,
                self.run.pool.parts.training.from_step,
                self.run.pool.parts.held_out,
                covariance,
                pace=Pace(self.protocol.steps),
                listener=ignore,
            )
            seconds = perf_counter() - start
            done = Recovery(rate, found.loss_before, found.loss_after, found.kept_step, seconds)
            trained.append((model, done))
        model, best = min(trained, key=lambda pair: pair[1].loss_after)
        return model, best, tuple(recovery for _, recovery in trained)

    def _exported(self, model: nn.Module, name: str) -> Path:
        """The network as a graph that has been compared with it."""
        path = self.folder / f"{name}.onnx"
        path.unlink(missing_ok=True)
        size = self.run.network.opened.preprocessing.input_size
        return export_onnx(model, path, input_size=size, metadata={}, batch_sizes=(1, 2)).path

    def _latencies(self, *graphs: Path) -> list[float]:
        """Median times in ms of one image in ONNX Runtime, the graphs in turn."""
        image = torch.zeros(1, *self.run.network.opened.preprocessing.input_size)
        networks = [open_onnx(graph) for graph in graphs]
        times = in_turn([(network, image) for network in networks], seconds=0, fewest=ROUNDS)
        return [median(own) for own in times]


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES / 1e6


def sentence(error: BaseException) -> str:
    """What went wrong, on one line; a stranger's error with its kind in front."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (NotReachedError, KcrPruneError)):
        return " ".join(lines)
    text = lines[-1] if lines and lines[0] == lines[-1] else (lines or ["no reason given"])[0]
    return f"{type(error).__name__}: {text[:300]}"
