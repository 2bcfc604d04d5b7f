"""Reconstruction: each block of a cut network is trained as a whole towards the dense network's residual stream.

The refit before it solves one linear at a time, with the others as they are; gradient steps move all linears of a block
together. The gradient stays inside the block, and no label is looked at, as in the reconstruction of quantised blocks
(BRECQ: Li et al., 2021).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kcrprune.training.randomness import generator


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast; called with a block, it trains it."""

    epochs: int  # passes over the calibration images
    lr: float  # of Adam, first; it falls to zero along a line
    seed: int
    stage: str  # with the seed and the epoch it is the address of the order of the batches

    def __call__(self, block: nn.Module, before: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Lowers the squared difference of `block(before)` and `target`, batch by batch of streams in memory.

        The linears alone are trained. Weights that end farther from `target` than they began are put back.
        """
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        weights = [weight for linear in linears for weight in linear.parameters()]
        optimizer = torch.optim.Adam(weights, lr=self.lr)
        steps = self.epochs * len(before)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        first, start = copy.deepcopy(block.state_dict()), stream_error(block, before, target)
        for epoch in range(self.epochs):
            order = torch.randperm(len(before), generator=generator(self.seed, self.stage, epoch, "order"))
            for index in order.tolist():
                with torch.enable_grad():
                    loss = _squares(block, before[index], target[index]).mean()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        if not stream_error(block, before, target) < start:
            block.load_state_dict(first)


@torch.no_grad()
def stream_error(block: nn.Module, before: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Sum of the squared differences of `block(before)` and `target`."""
    return sum(float(_squares(block, x, y).sum()) for x, y in zip(before, target, strict=True))


def _squares(block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    device = next(block.parameters()).device
    return (block(x.to(device)) - y.to(device)).square()
