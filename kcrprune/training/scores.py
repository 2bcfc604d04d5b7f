"""What each channel is worth before anything is trained: the start of the search, and the whole plan without one.

Letters: B images of a batch, n gates, y labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kcrprune import processes
from kcrprune.families import Group, Slot, outputs_of, owner_of
from kcrprune.method.budget import Scores
from kcrprune.method.cost import MacCost
from kcrprune.method.gates import Gates
from kcrprune.method.sums import Sums
from kcrprune.plan import Outputs


@dataclass
class SquaredGradients(Sums):
    """Sums over images of the squared gradient of each gate."""

    total: Tensor  # (n,)
    images: int = 0


def fisher_scores(
    model: nn.Module,
    gates: Gates,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    outputs: Outputs | None = None,
) -> Scores:
    """Half the mean over images of (d log p(y) / d g)^2 at g = 1, y drawn from the network's own output.

    The second-order estimate, in nats an image, of what closing a gate costs, with the true Fisher information in
    place of the Hessian. Comparable across axes and blocks; needs no labels (the gradient of a loss towards the
    network itself would be zero). A network of features is scored on them under unit Gaussian noise. `outputs` None: as
    its last layer says.
    """
    device = next(model.parameters()).device
    squares = SquaredGradients(torch.zeros_like(gates.logits, dtype=torch.float64))
    for batch, noise in with_noise(batches, generator):
        gates.open_per_image_(len(batch))
        loss = sampled_loss(model, model(batch.to(device, non_blocking=True)).float(), noise, outputs)
        [gradient] = torch.autograd.grad(loss, [gates.value])  # (B, n)
        squares.total += gradient.square().sum(0)
        squares.images += len(batch)
    squares.sum_over_processes_()
    gates.harden_(torch.ones_like(gates.logits))
    return _scores(gates, squares.total / (2 * max(1, squares.images)))


@dataclass(frozen=True)
class Noise:
    """What is drawn for a batch: of several processes each draws for all images and takes the rows of its own."""

    generator: torch.Generator
    first: int = 0  # place in the batch of the first image that is at hand
    images: int | None = None  # of the batch; None: those at hand

    def like(self, output: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows for an output (images at hand, ...), of what `draw` fills a tensor for the whole batch with."""
        whole = draw(torch.empty(self.images or len(output), *output.shape[1:]))
        return whole[self.first : self.first + len(output)]


def with_noise(batches: Sequence[Tensor], generator: torch.Generator) -> Iterator[tuple[Tensor, Noise]]:
    """Batches, each with what is drawn for it; what one process draws for an image, several draw."""
    for batch, (first, images) in zip(batches, processes.places([len(batch) for batch in batches]), strict=True):
        yield batch, Noise(generator, first, images)


def sampled_loss(model: nn.Module, output: Tensor, noise: Noise, outputs: Outputs | None = None) -> Tensor:
    """Cross-entropy, summed over a batch, of `output` (batch, classes) with labels drawn from that very output.

    The squares of its gradients are the true Fisher information. Of features (batch, ...): their product with a
    direction of unit Gaussian noise, whose squared gradients are those of the squared error. `outputs` None: as the
    model's last layer says.
    """
    if (outputs or outputs_of(model)) == "features":
        direction = noise.like(output, lambda empty: empty.normal_(generator=noise.generator))
        return (output * direction.to(output, non_blocking=True)).sum()
    # the least of exponential variates over their rates is a rate's own with the probability of its share
    waiting = noise.like(output, lambda empty: empty.exponential_(generator=noise.generator))
    drawn = (output.detach().softmax(1).cpu() / waiting).argmax(1)
    return F.cross_entropy(output, drawn.to(output.device, non_blocking=True), reduction="sum")


@torch.no_grad()
def magnitude_scores(model: nn.Module, gates: Gates, groups: Sequence[Group]) -> Scores:
    """Squared norm of the weights that a gate would remove; the plain baseline. `groups` are all of the model."""
    by_key = {group.key: group for group in groups}
    scores = []
    for group, _ in gates:
        if group.axis == "heads":
            scores.append(_magnitudes(model, by_key[group.site, "attn_value"]).view(group.width, -1).sum(1))
        else:
            units = [group.channels([unit]) for unit in range(group.units)]
            by_head = _magnitudes(model, group).view(group.heads, -1)
            scores.append(by_head[:, torch.tensor(units, device=by_head.device)].sum(2).flatten())
    return _scores(gates, torch.cat(scores))


def _magnitudes(model: nn.Module, group: Group) -> Tensor:
    """Squared norms of the weights of each channel, (heads * width,)."""
    matrices = [slot for slot in (*group.writers, *group.readers) if _is_matrix(model, slot)]
    total = torch.zeros(group.heads * group.width, device=next(model.parameters()).device)
    for slot in matrices:
        squares = owner_of(model, slot.owner).weight.square().transpose(0, slot.dim).flatten(1).sum(1)  # type: ignore[union-attr,operator]
        total += squares[slot.among(group.heads, group.width)]
    return total


def _is_matrix(model: nn.Module, slot: Slot) -> bool:
    return isinstance(owner_of(model, slot.owner), nn.Linear | nn.Conv2d)


def prices(gates: Gates, cost: MacCost) -> Tensor:
    """(n,) MACs that each gate holds while everything else is whole."""
    return torch.cat([torch.full((part.stop - part.start,), float(cost.channel(group))) for group, part in gates]).to(
        gates.logits
    )


def random_scores(gates: Gates, cost: MacCost, generator: torch.Generator) -> Scores:
    """Uniform noise times the channel's cost, so that every axis is cut alike; the humblest baseline."""
    noise = torch.rand(gates.logits.shape, generator=generator)
    return _scores(gates, noise.to(gates.logits) * prices(gates, cost))


def equal_scores(gates: Gates, cost: MacCost) -> Scores:
    """The same score for each MAC, so that every gate of a search starts undecided, as the paper's do."""
    return _scores(gates, prices(gates, cost))


def _scores(gates: Gates, flat: Tensor) -> Scores:
    return gates.by_group(flat.detach().float().cpu())
