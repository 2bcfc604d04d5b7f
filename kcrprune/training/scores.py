"""What each channel is worth before anything is trained: the start of the search, and the whole plan without one.

Letters: B images of a batch, g gates, y labels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kcrprune.families import classifiers
from kcrprune.method.budget import Scores, channel_macs
from kcrprune.method.gates import Gates
from kcrprune.surgery.swap import linear_at


def fisher_scores(model: nn.Module, gates: Gates, batches: Iterable[Tensor], generator: torch.Generator) -> Scores:
    """Half the mean over images of (d log p(y) / d g)^2 at g = 1, y drawn from the network's own output.

    The second-order estimate, in nats an image, of what closing a gate costs, with the true Fisher information in
    place of the Hessian. Comparable across axes and blocks; needs no labels (the gradient of a loss towards the
    network itself would be zero). A backbone without a head is scored on its features under unit Gaussian noise.
    """
    device = next(model.parameters()).device
    totals = [torch.zeros_like(gate.logits) for _, _, gate in gates]
    images = 0
    for batch in batches:
        gates.open_per_image_(len(batch))
        output = model(batch.to(device))
        loss = sampled_loss(model, output.float(), generator)
        gradients = torch.autograd.grad(loss, [gate.value for _, _, gate in gates])
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.square().sum(0)
        images += len(batch)
    for _, _, gate in gates:
        gate.harden_(torch.ones_like(gate.logits))
    return _by_site(gates, [total / (2 * max(1, images)) for total in totals])


def sampled_loss(model: nn.Module, output: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy, summed over a batch, of `output` (batch, classes) with labels drawn from that very output.

    The squares of its gradients are the true Fisher information. Of a backbone without a head: the features' product
    with unit Gaussian noise, whose squared gradients are those of the squared error.
    """
    if not classifiers(model):
        noise = torch.randn(output.shape, generator=generator).to(output)
        return (output * noise).sum()
    drawn = torch.multinomial(output.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
    return F.cross_entropy(output, drawn.to(output.device), reduction="sum")


@torch.no_grad()
def magnitude_scores(model: nn.Module, gates: Gates) -> Scores:
    """Squared norm of the weights that a gate would remove; the plain baseline."""
    scores = []
    for site, axis, _ in gates:
        qkv = linear_at(model, site.qkv).weight.unflatten(0, (3, site.heads * site.head_dim))
        proj = linear_at(model, site.proj).weight
        fc1, fc2 = linear_at(model, site.fc1).weight, linear_at(model, site.fc2).weight
        value = qkv[2].square().sum(1) + proj.square().sum(0)  # (h * d,)
        scores.append(
            {
                "mlp_io": lambda fc1=fc1, fc2=fc2: fc1.square().sum(0) + fc2.square().sum(1),
                "mlp_hidden": lambda fc1=fc1, fc2=fc2: fc1.square().sum(1) + fc2.square().sum(0),
                "attn_query": lambda qkv=qkv: qkv[0].square().sum(1) + qkv[1].square().sum(1),
                "attn_value": lambda value=value: value,
                "heads": lambda value=value, site=site: value.view(site.heads, site.head_dim).sum(1),
            }[axis]()
        )
    return _by_site(gates, scores)


def random_scores(gates: Gates, generator: torch.Generator) -> Scores:
    """Uniform noise times the channel's cost, so that every axis is cut alike; the humblest baseline."""
    noise = [torch.rand(gate.logits.shape, generator=generator) for _, _, gate in gates]
    return _by_site(gates, [x * channel_macs(site, axis) for x, (site, axis, _) in zip(noise, gates, strict=True)])


def equal_scores(gates: Gates) -> Scores:
    """The same score for each MAC, so that every gate of a search starts undecided, as the paper's do."""
    return _by_site(
        gates, [torch.full_like(gate.logits, float(channel_macs(site, axis))) for site, axis, gate in gates]
    )


def _by_site(gates: Gates, scores: list[Tensor]) -> Scores:
    found: dict = {site.name: {} for site in gates.sites}
    for (site, axis, _), score in zip(gates, scores, strict=True):
        found[site.name][axis] = gates.shaped(site, axis, score.detach().float().cpu())
    return found
