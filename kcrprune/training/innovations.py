"""The innovations of the linears behind an axis, from the network's own statistics on images.

Letters: I inputs, O outputs of a linear, n tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from kcrprune import processes
from kcrprune.families import Feed, Group
from kcrprune.families.given import glimpse
from kcrprune.families.linears import Linear, matrix
from kcrprune.families.observed import watching
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.method.innovations import Innovations, elimination_order
from kcrprune.method.sums import Sums, gram
from kcrprune.plan import PER_HEAD, Outputs
from kcrprune.surgery.partial import RealTokens, real_tokens
from kcrprune.surgery.swap import linear_at
from kcrprune.training.scores import sampled_loss, with_noise


@dataclass
class LinearSums(Sums):
    """Sums over tokens of a linear's inputs, of their products, and of the products of gradients at its outputs."""

    inputs: Tensor  # (I,)
    products: Tensor  # (I, I)
    gradients: Tensor  # (O, O)
    tokens: int = 0


class LinearMoments:
    """The sums of one linear over the tokens of all images, in float64.

    `real` says which tokens are no window padding. Inputs are taken from `origin` (I,), a point near their mean that is
    the same in all processes, so that a large mean costs the covariance no digits.
    """

    def __init__(self, linear: Linear, origin: Tensor, real: RealTokens | None = None) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=linear.weight.device)
        outputs, inputs = linear.weight.shape[:2]
        self.sums = LinearSums(zeros(inputs), zeros(inputs, inputs), zeros(outputs, outputs))
        self.origin = origin
        self.real = real
        self.output: Tensor | None = None

    def see_inputs(self, inputs: Tensor, output: Tensor) -> None:
        """Takes in inputs (..., I), and keeps the output for its gradient."""
        x = inputs.detach().flatten(0, -2)  # (n, I)
        if self.real is not None:
            x = self.real.of(x)
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
    batches: Sequence[Any],
    generator: torch.Generator,
    outputs: Outputs | None = None,
    room: float = inf,
) -> dict[str, Innovations]:
    """Those of each reader behind an open group, by its name.

    One forward and backward pass over `batches` of images, towards labels (of features: directions) drawn from the
    network's own output; `outputs` None: as its last layer says. Memory: 8 bytes for each pair of inputs and each of
    outputs of a linear, of all linears together; where that is more than `room` bytes, of as many as fit, and as many
    passes more, which draw the same.
    """
    found, start = {}, generator.get_state()
    for wanted in _rounds(model, refitted_readers(open_), room):
        generator.set_state(start)
        found |= _found(model, wanted, batches, generator, outputs)
    return found


def _rounds(model: nn.Module, wanted: Mapping[str, Group], room: float) -> Iterator[dict[str, Group]]:
    """Readers whose sums fit `room` bytes together; a single one, where not even that fits."""
    taken, size = dict[str, Group](), 0
    for name, group in wanted.items():
        outputs, inputs = linear_at(model, name).weight.shape[:2]
        needed = 8 * (inputs**2 + outputs**2)
        if taken and size + needed > room:
            yield taken
            taken, size = {}, 0
        taken[name], size = group, size + needed
    if taken:
        yield taken


def _found(
    model: nn.Module,
    wanted: Mapping[str, Group],
    batches: Sequence[Any],
    generator: torch.Generator,
    outputs: Outputs | None,
) -> dict[str, Innovations]:
    image = glimpse(batches[0]).to(next(model.parameters()).device, non_blocking=True)
    origins = _origins(model, list(wanted), image)
    moments = {
        name: LinearMoments(linear_at(model, name), origins[name], _real(model, group, image))
        for name, group in wanted.items()
    }
    _gather_(model, moments, batches, generator, outputs)
    found = {}
    for name, group in wanted.items():
        linear, sums = linear_at(model, name), moments.pop(name)
        sums.sums.sum_over_processes_()
        # without a bias nothing can make up for the mean of an input that goes
        mean, covariance = sums.mean_and_covariance(centred=linear.bias is not None or wanted[name].affine is not None)
        with ALGEBRA.running():
            order = elimination_order(matrix(linear).detach(), covariance, sums.sums.gradients, heads=group.heads)
            found[name] = Innovations.of(mean, covariance, order)
    return found


def _gather_(
    model: nn.Module,
    moments: Mapping[str, LinearMoments],
    batches: Sequence[Any],
    generator: torch.Generator,
    outputs: Outputs | None,
) -> None:
    device = next(model.parameters()).device
    with watching(model, {name: sums.see_inputs for name, sums in moments.items()}):
        for batch, noise in with_noise(batches, generator):
            loss = sampled_loss(model, model(batch.to(device, non_blocking=True)).float(), noise, outputs)
            seen = [sums.output for sums in moments.values() if sums.output is not None]
            for sums, gradient in zip(moments.values(), torch.autograd.grad(loss, seen), strict=True):
                sums.see_gradient(gradient)
                sums.output = None


@torch.no_grad()
def _origins(model: nn.Module, names: Sequence[str], image: Tensor | Feed) -> dict[str, Tensor]:
    """Mean inputs (I,) of linears over the tokens of the first process's first image."""
    found: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor, _: Tensor) -> None:
        found[name] = inputs.flatten(0, -2).mean(0)

    with watching(model, {name: partial(see, name) for name in names}):
        model(image)
    if processes.count() == 1:
        return found
    return {
        name: processes.summed(found[name] if processes.rank() == 0 else torch.zeros_like(found[name]))
        for name in names
    }


@torch.no_grad()
def _real(model: nn.Module, group: Group, image: Tensor | Feed) -> RealTokens | None:
    """Which of the tokens of one image that reach a reader are no window padding; None: all, as of any feed."""
    if group.axis not in PER_HEAD or group.stream is None or isinstance(image, Feed):
        return None
    if group.stream == group.site:  # nothing pads what is read as it is
        return None
    real = real_tokens(model, group.stream, group.site, image)
    return None if real.all else real
