"""The innovations of the linears behind an axis, from the network's own statistics on images.

Letters: I inputs, O outputs of a linear, n tokens of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kcrprune.families import Group
from kcrprune.families.linears import Linear, matrix
from kcrprune.families.observed import watching
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.method.innovations import Innovations, elimination_order
from kcrprune.method.sums import Sums, gram
from kcrprune.plan import PER_HEAD, Outputs
from kcrprune.surgery.partial import RealTokens, real_tokens
from kcrprune.surgery.swap import linear_at
from kcrprune.training.scores import sampled_loss


@dataclass
class LinearSums(Sums):
    """Sums over tokens of a linear's inputs, of their products, and of the products of gradients at its outputs."""

    inputs: Tensor  # (I,)
    products: Tensor  # (I, I)
    gradients: Tensor  # (O, O)
    tokens: int = 0


class LinearMoments:
    """The sums of one linear over the tokens of all images, in float64.

    `real` says which tokens are no window padding. Inputs are taken from a point near their mean, so
    that a large mean costs the covariance no digits.
    """

    def __init__(self, linear: Linear, real: RealTokens | None = None) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=linear.weight.device)
        outputs, inputs = linear.weight.shape[:2]
        self.sums = LinearSums(zeros(inputs), zeros(inputs, inputs), zeros(outputs, outputs))
        self.origin: Tensor | None = None
        self.real = real
        self.output: Tensor | None = None

    def see_inputs(self, inputs: Tensor, output: Tensor) -> None:
        """Takes in inputs (..., I), and keeps the output for its gradient."""
        x = inputs.detach().flatten(0, -2)  # (n, I)
        if self.real is not None:
            x = self.real.of(x)
        if self.origin is None:
            self.origin = x.mean(0)
        x = x - self.origin
        self.sums.inputs += x.sum(0)
        self.sums.products += gram(x)
        self.sums.tokens += len(x)
        self.output = output

    def see_gradient(self, gradient: Tensor) -> None:
        """Takes in the gradient (..., O) at the output."""
        flat = gradient.flatten(0, -2)
        self.sums.gradients += gram(flat)

    def mean_and_covariance(self, *, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Of the inputs, (I,) and (I, I); not centred: the mean is zero, and second moments are in its place."""
        assert self.origin is not None, "no images"
        mean = self.sums.inputs / self.sums.tokens  # from the origin
        covariance = self.sums.products / self.sums.tokens - torch.outer(mean, mean)
        mean = mean + self.origin
        return (mean, covariance) if centred else (torch.zeros_like(mean), covariance + torch.outer(mean, mean))


def refitted_readers(open_: Sequence[Group]) -> dict[str, Group]:
    """The linears whose inputs an open group cuts and whose rest is refitted to make up for them, with that group.

    Not where whole heads may go as well, whose order of elimination would be one of heads, nor behind `mlp_io`, whose
    channels lose outputs of fc2 too.
    """
    heads = {group.site for group in open_ if group.axis == "heads"}
    return {
        group.readers[0].owner: group
        for group in open_
        if group.readers and not group.wide and not (group.axis in PER_HEAD and group.site in heads)
    }


def innovations_of(
    model: nn.Module,
    open_: Sequence[Group],
    batches: Sequence[Tensor],
    generator: torch.Generator,
    outputs: Outputs | None = None,
) -> dict[str, Innovations]:
    """Those of each reader behind an open group, by its name.

    One forward and backward pass over `batches` of images, towards labels (of features: directions) drawn from the
    network's own output; `outputs` None: as its last layer says. Memory: 16 bytes for each pair of inputs of a linear,
    of all linears together.
    """
    wanted = refitted_readers(open_)
    if not wanted:
        return {}
    image = batches[0][:1].to(next(model.parameters()).device, non_blocking=True)
    moments = {
        name: LinearMoments(linear_at(model, name), _real(model, group, image)) for name, group in wanted.items()
    }
    _gather_(model, moments, batches, generator, outputs)
    found = {}
    for name, group in wanted.items():
        linear, sums = linear_at(model, name), moments.pop(name)
        # without a bias nothing can make up for the mean of an input that goes
        mean, covariance = sums.mean_and_covariance(centred=linear.bias is not None or wanted[name].affine is not None)
        with ALGEBRA.running():
            order = elimination_order(matrix(linear).detach(), covariance, sums.sums.gradients, heads=group.heads)
            found[name] = Innovations.of(mean, covariance, order)
    return found


def _gather_(
    model: nn.Module,
    moments: Mapping[str, LinearMoments],
    batches: Iterable[Tensor],
    generator: torch.Generator,
    outputs: Outputs | None,
) -> None:
    device = next(model.parameters()).device
    with watching(model, {name: sums.see_inputs for name, sums in moments.items()}):
        for batch in batches:
            loss = sampled_loss(model, model(batch.to(device, non_blocking=True)).float(), generator, outputs)
            seen = [sums.output for sums in moments.values() if sums.output is not None]
            for sums, gradient in zip(moments.values(), torch.autograd.grad(loss, seen), strict=True):
                sums.see_gradient(gradient)
                sums.output = None


@torch.no_grad()
def _real(model: nn.Module, group: Group, image: Tensor) -> RealTokens | None:
    """Which of the tokens of one image that reach a reader are no window padding; None: all."""
    if group.axis not in PER_HEAD or group.stream in (None, group.site):  # nothing pads what is read as it is
        return None
    real = real_tokens(model, group.stream, group.site, image)
    return None if real.all else real
