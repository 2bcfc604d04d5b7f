"""The innovation bases of the linears that a refit will correct, from the network's own statistics on images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite
from kcrprune.method.innovations import InnovationBasis, elimination_order
from kcrprune.plan import Axis
from kcrprune.surgery.swap import linear_at
from kcrprune.training.scores import sampled_loss


@dataclass
class LinearMoments:
    """Sums over the tokens of all images of one linear's inputs, and of the gradients at its outputs."""

    inputs: Tensor  # (I,)
    products: Tensor  # (I, I)
    gradients: Tensor  # (O, O)
    tokens: int = 0

    @classmethod
    def of(cls, linear: nn.Linear) -> "LinearMoments":
        """Empty sums."""
        i, o, device = linear.in_features, linear.out_features, linear.weight.device
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(i), zeros(i, i), zeros(o, o))

    def see(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A forward hook: takes in the inputs now, and the gradients when they come."""
        x = inputs[0].detach().flatten(0, -2)  # (tokens, I)
        self.inputs += x.sum(0)
        self.products += x.T @ x
        self.tokens += len(x)
        output.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2)
        self.gradients += flat.T @ flat

    def basis(self, weight: Tensor, images: int, heads: int) -> InnovationBasis:
        """The innovation basis of a linear with this weight (O, I)."""
        mean = self.inputs / self.tokens
        covariance = self.products / self.tokens - torch.outer(mean, mean)
        order = elimination_order(weight.detach(), covariance, self.gradients / images, heads=heads)
        return InnovationBasis.of(mean, covariance, order)


def refitted_linears(site: BlockSite, axes: Sequence[Axis]) -> dict[Axis, str]:
    """The linears of a block whose inputs an open axis cuts and whose rest a refit corrects, by axis.

    Not proj where whole heads may go: its order of elimination would be one of heads.
    """
    found: dict[Axis, str] = {}
    if "mlp_hidden" in axes:
        found["mlp_hidden"] = site.fc2
    if "attn_value" in axes and "heads" not in axes:
        found["attn_value"] = site.proj
    return found


def innovation_bases(
    model: nn.Module,
    open_axes: Mapping[str, Sequence[Axis]],
    sites: Sequence[BlockSite],
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> dict[str, InnovationBasis]:
    """The basis of each linear that a refit will correct, by its name; `open_axes` are those of each site.

    One forward and backward pass over `batches` of images, towards labels drawn from the network's own output.
    """
    wanted = [(s, axis, name) for s in sites for axis, name in refitted_linears(s, open_axes.get(s.name, ())).items()]
    moments = {name: LinearMoments.of(linear_at(model, name)) for _, _, name in wanted}
    hooks = [linear_at(model, name).register_forward_hook(moments[name].see) for name in moments]
    device, images = next(model.parameters()).device, 0
    try:
        for batch in batches:
            sampled_loss(model, model(batch.to(device)).float(), generator).backward()
            model.zero_grad()
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: moments.pop(name).basis(linear_at(model, name).weight, images, site.heads if axis == "attn_value" else 1)
        for site, axis, name in wanted
    }
