"""What a run minimises, and the loss on held-out images that it decides by."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Listener, ignore
from kcrprune.method.objective import Loss, Objective
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


PART: Final = 32  # images; what the error of a difference is taken over


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

    def loss(self, model: nn.Module) -> float:
        """Mean over the images, of `model` in eval mode; its own mode comes back."""
        total, images = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for loss, count in self._parts(model):
            total += loss.total.double()
            images += count
        return float(processes.summed(total)) / max(1, sum(processes.of_all(images)))

    def parts(self, model: nn.Module) -> dict[str, Tensor]:
        """What the loss is made of: of each part of the images, alike for all networks, sum and images (parts, 2)."""
        found = self._parts(model)
        sums = torch.stack([torch.stack([*loss.parts.values()]) for loss, _ in found]).tolist()
        own = [(row, images) for row, (_, images) in zip(sums, found, strict=True)]
        rows = [row for rows in processes.of_all(own) for row in rows]
        return {
            name: torch.tensor([(row[place], images) for row, images in rows], dtype=torch.float64)
            for place, name in enumerate(found[0][0].parts)
        }

    @torch.no_grad()
    def _parts(self, model: nn.Module) -> list[tuple[Loss, int]]:
        """The loss of each part of this process's images, summed, and how many these are."""
        self.dense.rewind_()
        found = []
        with evaluating(model):
            for inputs, labels in self.batches:
                batch = [tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels)]
                wanted = self.dense(batch[0]) if self.objective.use_dense else None
                found += self.portions.of(len(inputs), partial(self._of_batch, model, batch, wanted))
        return found

    def _of_batch(
        self, model: nn.Module, batch: Sequence[Tensor], wanted: Tensor | None, at_once: int
    ) -> list[tuple[Loss, int]]:
        """Those of a batch, of so many images at most."""
        if wanted is not None:
            self.wanted.show_(wanted)
        found = []
        for part in zip(*(tensor.split(min(at_once, PART)) for tensor in batch), strict=True):
            loss, images = self.objective(model, *part), len(part[0])
            parts = {name: value * images for name, value in loss.parts.items()}
            found.append((replace(loss, total=loss.total * images, parts=parts), images))
        return found


class _Rows:
    """What a network answered to a batch, for those who ask for parts of it, in order."""

    def show_(self, answer: Tensor) -> None:
        """From here on parts of this one, from its first row."""
        self.answer, self.position = answer, 0

    def __call__(self, images: Tensor) -> Tensor:
        """The next rows, as many as there are images."""
        self.position += len(images)
        return self.answer[self.position - len(images) : self.position]
