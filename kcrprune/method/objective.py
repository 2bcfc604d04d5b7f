"""The losses of search and recovery, with named parts.

L = task + kernel_weight * TNN. `task` is cross-entropy with labels (the paper), a distillation term towards the dense
network (ours), or both. The budget is not a loss here: it is met by construction (see budget).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kcrprune.families import FeatureTap, outputs_of
from kcrprune.method.kernel_complexity import relative_tnn, separable_tnn
from kcrprune.plan import Outputs

UNLABELLED = -1


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of; all but `total` is detached, and on the device of the network."""

    total: Tensor
    parts: dict[str, Tensor]
    features: Tensor  # (batch, d)

    @classmethod
    def mean(cls, losses: Sequence[tuple[float, Self]]) -> Self:
        """That of a batch, from the losses of its parts with their shares of the images."""
        if len(losses) == 1:
            return losses[0][1]
        total = torch.stack([share * loss.total for share, loss in losses]).sum()
        names = losses[0][1].parts
        parts = {name: torch.stack([share * loss.parts[name] for share, loss in losses]).sum() for name in names}
        return cls(total, parts, torch.cat([loss.features for _, loss in losses]))


@dataclass
class Objective:
    """What search and recovery minimise; `basis` (d, r) is refreshed by whoever trains.

    `tap` keeps the features that the kernel term acts on; those that enter the last layer unless told otherwise.
    `outputs` None: as the model's last layer says.
    """

    dense: Callable[[Tensor], Tensor]
    use_labels: bool
    use_dense: bool
    kernel_weight: float
    relative: bool = True
    smoothing: float = 0.0
    temperature: float = 1.0
    basis: Tensor | None = None
    tap: Callable[[nn.Module], FeatureTap] = FeatureTap
    outputs: Outputs | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        """The loss of `model` on a batch; images (batch, C, H, W), labels (batch,) with -1 where unknown."""
        with self.tap(model) as tap:
            output = model(images).float()
            features = tap.take().float()
        parts = self._task(model, output, images, labels)
        total = torch.stack(list(parts.values())).sum()
        if self.basis is not None:
            with torch.autocast(features.device.type, enabled=False):  # TNN is a difference of two large numbers
                tnn = (relative_tnn if self.relative else separable_tnn)(features.double(), self.basis.double()).float()
            parts["kernel"] = tnn
            total = total + self.kernel_weight * tnn
        figures = {name: part.detach() for name, part in ({"loss": total} | parts).items()}
        return Loss(total, figures, features.detach())

    def _task(self, model: nn.Module, output: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        parts = {}
        if self.use_labels:
            parts["labels"] = F.cross_entropy(output, labels, ignore_index=UNLABELLED, label_smoothing=self.smoothing)
        if self.use_dense:
            with torch.no_grad():
                wanted = self.dense(images).to(output, non_blocking=True)
            outputs = self.outputs or outputs_of(model)
            distance = logit_distance if outputs == "classes" else feature_distance
            parts["distill"] = distance(output, wanted, self.temperature)
        return parts


def logit_distance(output: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """KL from the dense network's softened output, times the squared temperature (Hinton et al., 2015)."""
    t = temperature
    kl = F.kl_div((output / t).log_softmax(1), (wanted / t).log_softmax(1), log_target=True, reduction="batchmean")
    return kl * t * t


def feature_distance(output: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over a batch of `relative_distances`; features have no temperature."""
    return relative_distances(output, wanted).mean()


def relative_distances(output: Tensor, wanted: Tensor) -> Tensor:
    """|y - y0|^2 / |y0|^2 of each image (batch,): features y (batch, ...) and y0, those wanted, neither centred.

    The one distance of features: losses, the choice between networks and reports take its mean over images, which does
    not depend on how they are batched. For vectors of equal length it is twice (1 - cosine).
    """
    y, y0 = output.flatten(1), wanted.flatten(1)
    return (y - y0).square().sum(1) / y0.square().sum(1).clamp_min(1e-12)
