"""The features of a network over images, and over the steps of a training: their covariance, KC and basis."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kcrprune.errors import DataError
from kcrprune.families import FeatureTap
from kcrprune.method.kernel_complexity import Covariance, kernel_complexity, rank_for
from kcrprune.method.objective import Objective
from kcrprune.training.snapshots import State


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
            model(images.to(device, non_blocking=True))
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

    def state(self) -> State:
        """What the next renewal depends on."""
        return {"seen": vars(self.seen), "steps": self.steps, "basis": self.objective.basis}

    def load_(self, state: State) -> None:
        """Goes on from a state."""
        device = self.seen.total.device
        self.seen = Covariance(state["seen"]["total"].to(device), state["seen"]["images"])
        self.steps = state["steps"]
        self.objective.basis = None if state["basis"] is None else state["basis"].to(device)

    def renew_(self) -> dict[str, float]:
        """Renews the objective's basis from what was seen, and returns its KC."""
        if self.objective.kernel_weight > 0:
            spectrum, self.objective.basis = self.seen.spectrum_and_basis(self.rank)
        else:
            spectrum = self.seen.spectrum()
        return {"kc": kernel_complexity(spectrum, self.seen.images).kc}
