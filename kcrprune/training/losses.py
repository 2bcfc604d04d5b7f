"""What a run minimises, and the loss on held-out images that it decides by."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Listener, ignore
from kcrprune.method.objective import Objective
from kcrprune.plan import Outputs
from kcrprune.training.evaluate import Remembered, evaluating
from kcrprune.training.portions import Portions


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

    def __init__(
        self, objective: Objective, batches: DataLoader, device: torch.device, listener: Listener = ignore
    ) -> None:
        self.portions = Portions("held-out images", device, listener)
        self.dense, self.wanted = Remembered(objective.dense, self.portions), _Rows()
        self.objective = replace(objective, dense=self.wanted, basis=None)
        self.batches, self.device = batches, device

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean over the images, of `model` in eval mode; its own mode comes back."""
        self.dense.rewind_()
        total, images = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with evaluating(model):
            for inputs, labels in self.batches:
                batch = [tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels)]
                wanted = self.dense(batch[0]) if self.objective.use_dense else None
                total += self.portions.of(len(inputs), partial(self._total, model, batch, wanted))
                images += len(inputs)
        return float(processes.summed(total)) / max(1, sum(processes.of_all(images)))

    def _total(self, model: nn.Module, batch: Sequence[Tensor], wanted: Tensor | None, at_once: int) -> Tensor:
        """The loss of a batch times its images, of parts of so many."""
        if wanted is not None:
            self.wanted.show_(wanted)
        parts = zip(*(tensor.split(at_once) for tensor in batch), strict=True)
        return torch.stack([self.objective(model, *part).total * len(part[0]) for part in parts]).double().sum()


class _Rows:
    """What a network answered to a batch, for those who ask for parts of it, in order."""

    def show_(self, answer: Tensor) -> None:
        """From here on parts of this one, from its first row."""
        self.answer, self.position = answer, 0

    def __call__(self, images: Tensor) -> Tensor:
        """The next rows, as many as there are images."""
        self.position += len(images)
        return self.answer[self.position - len(images) : self.position]
