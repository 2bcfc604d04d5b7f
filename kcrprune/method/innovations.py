"""What the inputs of a linear say that the inputs which stay longer do not: gates on that know the refit.

Inputs of a linear are put in the order in which they would be given up, each time those whose loss costs least after
the others have been refitted to make up for it. An input's innovation is its residual on all inputs that stay longer
(the word of Kailath, 1968). Cutting the first inputs of the order and refitting the rest to the linear's own output is
closing the gates on their innovations, up to the ridge. The elimination is that of optimal brain surgeon (Hassibi and
Stork, 1993) for whole columns.

Letters: I inputs, O outputs; W (O, I) weight, G (I, I) covariance of the inputs, S (O, O) second moment of the
gradient at the outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4  # share of its own variance that is added to each input's, so that inverses of G stay in bounds
ROUNDS = 128  # about as many rounds as a large linear's inputs are given up in


@dataclass(frozen=True)
class Innovations:
    """Innovations of x (..., I) are A (x - mean), and x = mean + B innovations."""

    analysis: Tensor  # A (I, I), triangular in the order of elimination
    synthesis: Tensor  # B = A^-1
    mean: Tensor  # (I,)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, order: Tensor) -> "Innovations":
        """Those of inputs with this mean (I,) and covariance (I, I), given up in `order` (I,)."""
        lasting = order.flip(0)
        factor = torch.linalg.cholesky(_lifted(covariance)[lasting][:, lasting])
        unit = factor / factor.diagonal()  # lower triangular with ones: x - mean = unit innovations
        inverse = torch.linalg.solve_triangular(
            unit, torch.eye(len(unit), dtype=unit.dtype, device=unit.device), upper=False
        )
        analysis, synthesis = torch.zeros_like(unit), torch.zeros_like(unit)
        analysis[lasting[:, None], lasting] = inverse
        synthesis[lasting[:, None], lasting] = unit
        return cls(analysis.float(), synthesis.float(), mean.float())


def elimination_order(weight: Tensor, covariance: Tensor, curvature: Tensor, *, heads: int = 1) -> Tensor:
    """The inputs (I,) of a linear, first those that are missed least once the rest is refitted.

    A set R of inputs costs tr(S E) / 2, with E (O, O) the covariance of what the refitted rest cannot make of W_R x_R:
    half the squared gradient along the error, for gradients that do not depend on the inputs (as in K-FAC: Martens and
    Grosse, 2015). Of several heads, whose inputs lie side by side, each gives up as many inputs a round as the others,
    because all heads of a block keep the same number. From 2 * ROUNDS inputs of a head on, several go at once.
    """
    state = _Elimination(weight.double(), _lifted(covariance), curvature.double())
    size = weight.shape[1] // heads
    group = torch.arange(weight.shape[1], device=weight.device) // size
    together = max(1, size // ROUNDS)
    order = []
    while len(state.left):
        cheapest = state.costs().argsort()
        by_head = cheapest[group[state.left][cheapest].argsort(stable=True)].view(heads, -1)
        chosen = by_head[:, :together].flatten()
        order.append(state.left[chosen])
        state.give_up_(chosen)
    return torch.cat(order)


class _Elimination:
    """Weight, its product with the curvature, and the inverse covariance of the inputs that are left."""

    def __init__(self, weight: Tensor, covariance: Tensor, curvature: Tensor) -> None:
        self.weight, self.priced = weight, curvature @ weight  # (O, I)
        self.inverse = torch.linalg.inv(covariance)  # (I, I)
        self.left = torch.arange(weight.shape[1], device=weight.device)

    def costs(self) -> Tensor:
        """What giving up each input alone would cost, (inputs left,)."""
        return (self.weight * self.priced).sum(0) / (2 * self.inverse.diagonal())

    def give_up_(self, chosen: Tensor) -> None:
        """Takes inputs out at once; the weights of the others make up for them as well as they can."""
        inverse = torch.linalg.inv_ex(self.inverse[chosen][:, chosen]).inverse  # `inv` waits to see that there is one
        share = self.inverse[:, chosen] @ inverse  # (inputs left, chosen)
        goes = torch.zeros_like(self.left).index_fill(0, chosen, 1)
        stay = goes.argsort(stable=True)[: len(goes) - len(chosen)]  # a mask would wait for how many there are
        self.weight = (self.weight - self.weight[:, chosen] @ share.T)[:, stay]
        self.priced = (self.priced - self.priced[:, chosen] @ share.T)[:, stay]
        self.inverse = (self.inverse - share @ self.inverse[chosen])[stay][:, stay]
        self.left = self.left[stay]


def _lifted(covariance: Tensor) -> Tensor:
    """The covariance in float64 with a little more variance for every input, so that it has an inverse."""
    variance = covariance.diagonal().double().clamp_min(0)
    return covariance.double() + torch.diag(RIDGE * variance + 1e-6 * variance.mean().clamp_min(1e-24))
