"""What a run minimises, and the loss on held-out images that it decides by."""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import DataLoader

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.method.objective import Objective
from kcrprune.plan import Outputs
from kcrprune.training.evaluate import Remembered, evaluating


def make_objective(config: RunConfig, dense: nn.Module, *, labelled: bool, outputs: Outputs | None = None) -> Objective:
    """The losses that a run asks for; ConfigError where it wants labels and there are none, or none that count.

    `outputs` None: as the last layer of a network says.
    """
    labelled = labelled and config.labels and outputs != "features"
    if config.task == "labels" and not labelled:
        raise ConfigError("task 'labels' needs labelled images and a network of classes; use task 'distill'")
    return Objective(
        dense=dense,
        use_labels=labelled and config.task != "distill",
        use_dense=config.task != "labels",
        kernel_weight=config.kernel_weight,
        relative=config.kernel_norm == "relative",
        smoothing=config.smoothing,
        temperature=config.distill_temperature,
        outputs=outputs,
    )


class HeldOut:
    """Images that decide between networks: the mean task loss on them, without the kernel term.

    Several processes share them. The dense network runs over them once, however many networks are compared.
    """

    def __init__(self, objective: Objective, batches: DataLoader, device: torch.device) -> None:
        self.dense = Remembered(objective.dense)
        self.objective = replace(objective, dense=self.dense, basis=None)
        self.batches, self.device = batches, device

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean over the images, of `model` in eval mode; its own mode comes back."""
        self.dense.rewind_()
        total, images = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with evaluating(model):
            for inputs, labels in self.batches:
                moved = (tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels))
                loss = self.objective(model, *moved)
                total += loss.total * len(inputs)
                images += len(inputs)
        return float(processes.summed(total)) / max(1, sum(processes.of_all(images)))
