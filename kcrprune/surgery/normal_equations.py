"""The ridge regression of one linear: its sums over tokens, and their solution.

Letters: n tokens of all images, I inputs, O outputs; z (n, I) inputs, W (O, I) weight, b (O,) bias.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kcrprune.families.linears import Linear, matrix
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.method.sums import Sums, gram


@dataclass
class NormalEquations(Sums):
    """Sums over tokens that a ridge regression needs, in float64, for inputs with a column of ones appended."""

    gram: Tensor  # (I + 1, I + 1)
    cross: Tensor  # (I + 1, O), inputs times residuals: what is missing from the outputs

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        """No tokens yet."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(inputs + 1, inputs + 1), zeros(inputs + 1, outputs))

    def add_(self, z: Tensor, residual: Tensor) -> None:
        """Takes in tokens: inputs z (n, I), residuals (n, O)."""
        inputs = z.sum(0)
        self.gram[:-1, :-1] += gram(z)
        self.gram[-1, :-1] += inputs
        self.gram[:-1, -1] += inputs
        self.gram[-1, -1] += len(z)
        self.cross[:-1] += z.T @ residual
        self.cross[-1] += residual.sum(0)

    def behind(self, wanted: "Fitted", fitted: "Fitted", rows: Tensor | None) -> "NormalEquations":
        """Those of `fitted` where the residuals so far are how far its inputs z are from those of `wanted`.

        With x the inputs of `wanted` and V, c its weight and bias, of which `rows` are taken, its outputs are nearer by
        V x + c - (W z + b) = V (x - z) + (V - W) z + c - b.
        """
        both = (wanted.weight, wanted.bias), (fitted.weight, fitted.bias)
        theirs = [tensor.double() if rows is None else tensor.double()[rows] for tensor in both[0]]
        changes = [v - w.double() for v, w in zip(theirs, both[1], strict=True)]
        change = torch.cat([changes[0], changes[1][:, None]], dim=1)  # (O, I + 1)
        return NormalEquations(self.gram, self.cross @ theirs[0].T + self.gram @ change.T)

    def correction(self, ridge: float, *, bias: bool) -> Tensor:
        """The change of (W, b) that minimises squared residuals plus e times its own square, (O, I + 1).

        e is `ridge` times the mean squared input. The change 0 is among the candidates, so the squared residuals on
        this data never grow.
        """
        energy = self.gram.diagonal()[:-1]
        e = ridge * (energy.mean() if len(energy) else energy.sum()) + 1e-12
        penalty = e.repeat(len(self.gram))
        penalty[-1] = 1e-6 * e if bias else 1e9 * self.gram.trace()  # free, or held at zero
        return torch.linalg.solve_ex(self.gram + torch.diag(penalty), self.cross).result.T  # `solve` waits to check it


@dataclass(frozen=True)
class Fitted:
    """A linear with the batch norm right behind it, if there is one, whose running mean counts as a bias.

    So a linear without a bias of its own can be given one.
    """

    linear: Linear
    norm: BatchNorm | None = None

    @property
    def weight(self) -> Tensor:
        """(O, I)."""
        return matrix(self.linear)

    @property
    def bias(self) -> Tensor:
        """(O,); zeros where there is none."""
        bias = self.weight.new_zeros(len(self.weight)) if self.linear.bias is None else self.linear.bias
        return bias if self.norm is None or self.norm.running_mean is None else bias - self.norm.running_mean

    def __call__(self, z: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return nn.functional.linear(z, self.weight, self.bias)

    @ALGEBRA.running()
    def correct_(self, sums: NormalEquations, ridge: float) -> None:
        """Moves weight and bias to the solution, of the sums of all processes."""
        sums.sum_over_processes_()
        mean = None if self.norm is None else self.norm.running_mean
        change = sums.correction(ridge, bias=self.linear.bias is not None or mean is not None)  # (O, I + 1)
        self.linear.weight.add_(change[:, :-1].view_as(self.linear.weight).to(self.linear.weight))
        if self.linear.bias is not None:
            self.linear.bias.add_(change[:, -1].to(self.linear.bias))
        elif mean is not None:
            mean.sub_(change[:, -1].to(mean))
