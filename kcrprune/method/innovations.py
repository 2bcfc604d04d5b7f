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
WAITING = 192  # inputs, about, whose downdates are made together


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
    state = _Elimination(weight.double(), _lifted(covariance), curvature.double(), heads)
    together = max(1, weight.shape[1] // heads // ROUNDS) * heads
    order = []
    while len(state.left):
        order.append(state.give_up_(together, rounds=max(1, WAITING // together)))
    return torch.cat(order)


class _Elimination:
    """What is known of the inputs that are left, a row each: the inverse covariance, the weight, and S W beside it.

    An input that goes changes all rows by a multiple of its own. Few rows at a time are slow to subtract, so those of
    several rounds wait; until then they are subtracted from the rows that the next round looks at alone (as in a
    pivoted Cholesky factorisation in blocks).
    """

    def __init__(self, weight: Tensor, covariance: Tensor, curvature: Tensor, heads: int) -> None:
        outputs, inputs = weight.shape
        self.outputs, self.heads = outputs, heads
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))  # (I, I)
        self.weights = torch.cat([weight, curvature @ weight]).T.contiguous()  # (I, 2 O)
        self.left = torch.arange(inputs, device=weight.device)
        self.head = self.left // (inputs // heads)

    def give_up_(self, together: int, rounds: int) -> Tensor:
        """Takes inputs out, `together` a round; the weights of the others make up for them as well as they can."""
        left, outputs = len(self.left), self.outputs
        gone = min(together * rounds, left)
        shares, lost = self.inverse.new_empty(gone, left), self.inverse.new_empty(gone, 2 * outputs)
        worth = (self.weights[:, :outputs] * self.weights[:, outputs:]).sum(1)  # w^T S w of each
        spread = self.inverse.diagonal().clone()
        places = []
        for start in range(0, gone, together):
            end = min(start + together, gone)
            chosen = self._cheapest(worth / spread, end - start)
            places.append(chosen)
            rows, weights = self.inverse.index_select(0, chosen), self.weights.index_select(0, chosen)
            if start > 0:
                waiting = shares[:start].index_select(1, chosen).T
                rows.addmm_(waiting, shares[:start], alpha=-1)
                weights.addmm_(waiting, lost[:start], alpha=-1)
            factor = torch.linalg.cholesky_ex(rows.index_select(1, chosen)).L  # `cholesky` waits to see that it is one
            share = torch.linalg.solve_triangular(factor, rows, upper=False)
            weights = torch.linalg.solve_triangular(factor, weights, upper=False)
            shares[start:end], lost[start:end] = share, weights
            half = weights[:, :outputs]
            change = half @ self.weights[:, outputs:].T  # with S W as it was before the waiting rows, and these
            waiting = torch.cat([lost[:start, outputs:], weights[:, outputs:] / 2])
            change.addmm_(half @ waiting.T, shares[:end], alpha=-1)
            worth -= 2 * (change * share).sum(0)
            spread -= share.square().sum(0)
            worth.index_fill_(0, chosen, torch.inf)
            spread.index_fill_(0, chosen, 1)
        return self._close_(torch.cat(places), shares, lost)

    def _cheapest(self, costs: Tensor, count: int) -> Tensor:
        """Places of the inputs that go next, of every head as many."""
        cheapest = costs.argsort(stable=True)
        if self.heads == 1:
            return cheapest[:count]
        by_head = cheapest[self.head[cheapest].argsort(stable=True)].view(self.heads, -1)
        return by_head[:, : count // self.heads].flatten()

    def _close_(self, gone: Tensor, shares: Tensor, lost: Tensor) -> Tensor:
        """Subtracts what was waiting from the rows of the inputs that stay, and returns those that went."""
        found = self.left[gone]
        is_gone = torch.zeros_like(self.left).index_fill_(0, gone, 1)
        stay = is_gone.argsort(stable=True)[: len(self.left) - len(gone)]  # a mask would wait for how many there are
        shares = shares.index_select(1, stay)
        self.inverse = self.inverse.index_select(0, stay).index_select(1, stay).addmm_(shares.T, shares, alpha=-1)
        self.weights = self.weights.index_select(0, stay).addmm_(shares.T, lost, alpha=-1)
        self.left, self.head = self.left[stay], self.head[stay]
        return found


def _lifted(covariance: Tensor) -> Tensor:
    """The covariance in float64 with a little more variance for every input, so that it has an inverse."""
    variance = covariance.diagonal().double().clamp_min(0)
    return covariance.double() + torch.diag(RIDGE * variance + 1e-6 * variance.mean().clamp_min(1e-24))
