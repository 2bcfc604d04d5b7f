"""Reconstruction: each block of a cut network is trained as a whole towards the dense network's residual stream.

The refit before it solves one linear at a time, with the others as they are; gradient steps move all linears of a block
together. The gradient stays inside the block, and no label is looked at, as in the reconstruction of quantised blocks
(BRECQ: Li et al., 2021).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kcrprune.errors import DivergedError
from kcrprune.method.objective import Loss
from kcrprune.training.pace import Pace
from kcrprune.training.randomness import generator
from kcrprune.training.step import Training


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast; called with a block, it trains it."""

    epochs: int  # passes over the calibration images
    lr: float  # of Adam, first; it falls to zero along a line
    seed: int
    stage: str  # of the addresses of what is drawn

    def __call__(self, block: nn.Module, before: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Lowers the squared difference of `block(before)` and `target`, batch by batch of streams in memory.

        The linears alone are trained. Weights that end farther from `target` than they began are put back.
        """
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        weights = [weight for linear in linears for weight in linear.parameters()]
        optimizer = torch.optim.Adam(weights, lr=self.lr)
        pace = Pace(self.epochs * len(before))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=pace.steps)
        loss, device = partial(_loss, block), weights[0].device
        training = Training(self.stage, loss, optimizer, device, self.seed, pace, schedule)
        first, start = copy.deepcopy(block.state_dict()), stream_error(block, before, target)
        try:
            for epoch in range(self.epochs):
                order = torch.randperm(len(before), generator=generator(self.seed, self.stage, epoch, "order"))
                for index in order.tolist():
                    training.tell_(training.step_((before[index], target[index])).parts)
            better = stream_error(block, before, target) < start
        except DivergedError:
            better = False
        optimizer.zero_grad()
        if not better:
            block.load_state_dict(first)


@torch.no_grad()
def stream_error(block: nn.Module, before: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Sum of the squared differences of `block(before)` and `target`."""
    device = next(block.parameters()).device
    moved = ([tensor.to(device, non_blocking=True) for tensor in pair] for pair in zip(before, target, strict=True))
    errors = [(block(x) - y).square().sum() for x, y in moved]
    return float(torch.stack(errors).double().sum())


def _loss(block: nn.Module, stream: Tensor, target: Tensor) -> Loss:
    output = block(stream)
    error = (output - target).square().mean()
    return Loss(error, {"loss": error.detach()}, output.detach())
