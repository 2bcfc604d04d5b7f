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

from kcrprune.families import FeatureTap, classifiers
from kcrprune.method.kernel_complexity import relative_tnn, separable_tnn

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

    `tap` keeps the features that the kernel term acts on; those that enter the classifier unless told otherwise.
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

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        """The loss of `model` on a batch; images (batch, C, H, W), labels (batch,) with -1 where unknown."""
        with self.tap(model) as tap:
            output = model(images).float()
            features = tap.take().float()
        parts = self._task(model, output, images, labels)
        total = torch.stack(list(parts.values())).sum()
        if self.basis is not None:
            with torch.autocast(features.device.type, enabled=False):  # TNN is a difference of two large numbers
                tnn = (relative_tnn if self.relative else separable_tnn)(features, self.basis)
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
            distance = logit_distance if classifiers(model) else feature_distance
            parts["distill"] = distance(output, wanted, self.temperature)
        return parts


def logit_distance(output: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """KL from the dense network's softened output, times the squared temperature (Hinton et al., 2015)."""
    t = temperature
    kl = F.kl_div((output / t).log_softmax(1), (wanted / t).log_softmax(1), log_target=True, reduction="batchmean")
    return kl * t * t


def feature_distance(output: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared distance between features as a share of the dense network's; for backbones without a head."""
    return (output - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
