"""What every training stage shares: the device, the losses, a watch on the kernel."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError, DataError
from kcrprune.families import FeatureTap
from kcrprune.method.kernel_complexity import Covariance, kernel_complexity, rank_for
from kcrprune.method.objective import Objective
from kcrprune.training.evaluate import Remembered, evaluating


def open_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerator on the asked device; `auto` is a GPU where there is one, in bf16, else the CPU in fp32.

    ConfigError names a device that this machine lacks.
    """
    chosen = _available_device(device)
    if precision == "auto":
        precision = "bf16" if chosen.startswith("cuda") else "fp32"
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one process may ask for another device
    if chosen.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    accelerator = Accelerator(cpu=chosen == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    if accelerator.num_processes > 1:  # nothing shares the images out yet, so sums would count them twice
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched, and a run is one; start it without them"
        )
    return accelerator


def _available_device(device: str) -> str:
    count = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if count else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(f"device {device!r} is not here (this machine has {count} CUDA devices); use auto or cpu")
    return device


@torch.no_grad()
def feature_covariance(
    model: nn.Module, batches: Iterable[Tensor], tap: Callable[[nn.Module], FeatureTap] = FeatureTap
) -> Covariance:
    """Covariance of a model's features over all images of `batches`; each of several processes passes its own.

    DataError where the features are not finite numbers.
    """
    covariance: Covariance | None = None
    device = next(model.parameters()).device
    with tap(model) as seen:
        for images in batches:
            model(images.to(device))
            features = seen.take()
            covariance = covariance or Covariance.empty(features.shape[1], features.device)
            covariance.add_(features)
    assert covariance is not None, "no images"
    if not covariance.finite:
        raise DataError(
            f"the network's features of {covariance.images} images are not finite numbers: its weights or the images "
            "hold nan or infinite values, or its training diverged (lower lr)"
        )
    return covariance.sum_over_processes_()


class KernelWatch:
    """Follows the features of a training stage: their KC, and an objective's basis, both renewed every few steps.

    The first basis is that of `start`, the features of the dense network, and its rank stays. Of several processes each
    shows its own batches, and all renew the same basis at the same step.
    """

    def __init__(self, objective: Objective, start: Covariance, rank_share: float, every: int) -> None:
        self.objective = objective
        self.rank = rank_for(rank_share, start.images, start.total.shape[0])
        self.every = every
        self.seen = start
        self.steps = 0
        self.renew_()

    def see_(self, features: Tensor) -> dict[str, float]:
        """Takes in the features (batch, d) of one step; returns KC over the last steps when it is renewed."""
        if self.steps % self.every == 0:
            self.seen = Covariance.empty(features.shape[1], features.device)
        self.seen.add_(features)
        self.steps += 1
        if self.steps % self.every != 0:
            return {}
        self.seen.sum_over_processes_()
        if not self.seen.finite:  # the training has diverged, which whoever trains finds out; the last basis stays
            return {"kc": float("nan")}
        return self.renew_()

    def renew_(self) -> dict[str, float]:
        """Renews the objective's basis from what was seen, and returns its KC."""
        if self.objective.kernel_weight > 0:
            self.objective.basis = self.seen.basis(self.rank)
        return {"kc": kernel_complexity(self.seen.spectrum(), self.seen.images).kc}


def make_objective(config: RunConfig, dense: nn.Module, *, labelled: bool) -> Objective:
    """The losses that a run asks for; ConfigError where it wants labels and there are none."""
    labelled = labelled and config.labels
    if config.task == "labels" and not labelled:
        raise ConfigError("task 'labels' needs labelled images and a network with a head; use task 'distill'")
    return Objective(
        dense=dense,
        use_labels=labelled and config.task != "distill",
        use_dense=config.task != "labels",
        kernel_weight=config.kernel_weight,
        relative=config.kernel_norm == "relative",
        smoothing=config.smoothing,
        temperature=config.distill_temperature,
    )


class HeldOut:
    """Images that decide between networks: the mean task loss on them, without the kernel term.

    The dense network runs over them once, however many networks are compared.
    """

    def __init__(self, objective: Objective, batches: DataLoader, device: torch.device) -> None:
        self.dense = Remembered(objective.dense)
        self.objective = replace(objective, dense=self.dense, basis=None)
        self.batches, self.device = batches, device

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean over the images, of `model` in eval mode; its own mode comes back."""
        self.dense.rewind_()
        total, images = 0.0, 0
        with evaluating(model):
            for inputs, labels in self.batches:
                loss = self.objective(model, inputs.to(self.device), labels.to(self.device))
                total += float(loss.total) * len(inputs)
                images += len(inputs)
        return total / max(1, images)
