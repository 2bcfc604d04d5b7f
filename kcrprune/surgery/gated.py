"""Dense to gated and back: readers whose inputs, or their innovations, are multiplied by gates."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kcrprune.families import SLIM, Group
from kcrprune.families.linears import Linear
from kcrprune.method.gates import Gates
from kcrprune.method.innovations import Innovations
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.norm import GatedNorm
from kcrprune.surgery.swap import linear_at, swap_

Gate = Callable[[], Tensor]


class GatedLinear(nn.Linear):
    """A linear with gates on its inputs, its outputs or both; weight and bias are those of the dense one.

    Of a 1x1 convolution it is the same over positions, (B, C, H, W) to (B, O, H, W), with its weight as it is. With
    `innovations` the gates act on those of the inputs, so that closing them along their order is a cut with its refit.
    They belong to the network as it is: where its weights train on, they age.
    """

    def __init__(
        self,
        linear: Linear,
        *,
        in_gate: Gate | None = None,
        out_gate: Gate | None = None,
        innovations: Innovations | None = None,
    ) -> None:
        outputs, inputs = linear.weight.shape[:2]
        super().__init__(inputs, outputs, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.over_positions = isinstance(linear, nn.Conv2d)
        self.in_gate, self.out_gate = in_gate, out_gate
        self.innovations = innovations
        self._held: tuple[int, Tensor] | None = None  # W B, and the version of W that it was made of

    def forward(self, input: Tensor) -> Tensor:
        """out_gate * (W (in_gate * input) + b), or out_gate * (W input + b - W B ((1 - in_gate) * innovations)).

        Gates on innovations that each image has of its own are open, and there for their gradient.
        """
        if self.over_positions:
            return self._of_rows(input.movedim(1, -1)).movedim(-1, 1)
        return self._of_rows(input)

    def _of_rows(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        gate = None if self.in_gate is None else self.in_gate()
        if gate is None:
            output = self._product(input)
        elif self.innovations is None:
            output = self._product(times(input, gate))
        elif gate.ndim == 1:
            output = nn.functional.linear(input, *self._closed_weight(1 - gate, self.innovations))
        else:
            synthesis = self._synthesis(self.innovations).detach()
            output = _OpenGates.apply(self._product(input), input, gate, self.innovations, synthesis)
        return output if self.out_gate is None else times(output, self.out_gate())

    def _product(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.flatten(1), self.bias)

    def _closed_weight(self, closed: Tensor, innovations: Innovations) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what closed gates (I,), the same for all images, leave: two products of weights a step.

        In float32, since A and B are no well-conditioned matrices.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            held = self._synthesis(innovations) * closed.float()  # (O, I)
            weight = self.weight.flatten(1).float() - held @ innovations.analysis
            mean = held @ (innovations.analysis @ innovations.mean)
            return weight.to(self.weight.dtype), mean.to(self.weight.dtype) if self.bias is None else self.bias + mean

    def _synthesis(self, innovations: Innovations) -> Tensor:
        """W B; made anew only where the weight has changed."""
        if self.weight.requires_grad:
            return self.weight.flatten(1).float() @ innovations.synthesis
        if self._held is None or self._held[0] != self.weight._version:
            self._held = self.weight._version, self.weight.flatten(1).float() @ innovations.synthesis
        return self._held[1]


class _OpenGates(torch.autograd.Function):
    """Open gates (B, I) on innovations: the output stays, and their gradient is taken without a pass of its own.

    Closed ones would take W B ((1 - gate) * innovations) from the output, which moves neither it nor the gradient at
    the inputs as long as they are open.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, gate: Tensor, innovations: Innovations, synthesis: Tensor
    ) -> Tensor:
        """The output; `synthesis` is W B."""
        ctx.save_for_backward(input, gate, innovations.analysis, innovations.mean, synthesis)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the output as it is, and that of each image's gates."""
        input, gate, analysis, mean, synthesis = ctx.saved_tensors
        found = nn.functional.linear(input.float() - mean, analysis)
        found = found * (gradients[0].float() @ synthesis)
        return gradients[0], None, found.view(len(gate), -1, gate.shape[1]).sum(1).to(gate.dtype), None, None


def times(x: Tensor, gate: Tensor) -> Tensor:
    """Product of x (rows, ..., C) and a gate: (C,) for all, or (B, C) with an image's windows in adjacent rows."""
    if gate.ndim == 2:
        gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
        gate = gate.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return x * gate.to(x.dtype)


def is_open(group: Group, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns such as `blocks.1*` allow the block of this group to be cut."""
    return (not include or matches(group.block, include)) and not matches(group.block, exclude)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is the name, with `*` and `?` as in a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def add_gates_(
    model: nn.Module,
    groups: Sequence[Group],
    open_: Sequence[Group],
    *,
    innovations: Mapping[str, Innovations] | None = None,
) -> Gates:
    """Puts gates on the groups `open_` of a dense model; all start open, and the output is unchanged.

    `groups` are all groups of the model. `innovations` by name of a reader: its gates act on them.
    """
    weight = next(model.parameters())
    gates = Gates(open_, weight.device, weight.dtype)
    for site in dict.fromkeys(group.site for group in open_):
        here = [group for group in groups if group.site == site]
        _gate_site_(model, here, gates, innovations or {})
    return gates


def _gate_site_(model: nn.Module, here: Sequence[Group], gates: Gates, innovations: Mapping[str, Innovations]) -> None:
    """The gates of one branch module."""
    site, by_axis = here[0].site, {group.axis: group for group in here}
    if ("attn_query" in by_axis) and (site, "attn_query") in gates.slices:
        slim = SLIM[type(model.get_submodule(site))].of(model.get_submodule(site))
        query = by_axis["attn_query"]
        slim.query_gate = lambda: gates.channels(query)
        gates.replaced[site] = swap_(model, site, slim)
    for group in here:
        parts = [part for part in (group, by_axis.get("heads")) if part and part.key in gates.slices]
        parts = parts if group.axis == "attn_value" else [part for part in parts if part is group]
        if group.axis == "heads" or not group.readers or not parts:
            continue
        gate = _product(gates, parts, group.width)
        if group.norm and not any(slot.owner in innovations for slot in group.readers):
            norm = model.get_submodule(group.norm)
            gates.replaced[group.norm] = swap_(model, group.norm, GatedNorm(norm, gate))
        for slot in group.readers:
            _gated_linear_(model, slot.owner, gates).in_gate = gate
            _gated_linear_(model, slot.owner, gates).innovations = innovations.get(slot.owner)
        for slot in group.writers if group.wide else ():
            _gated_linear_(model, slot.owner, gates).out_gate = gate


def _product(gates: Gates, parts: Sequence[Group], width: int) -> Gate:
    """The product of gates on channels and gates on heads, each of which holds `width` channels."""

    def gate() -> Tensor:
        values = [
            gates.channels(part).repeat_interleave(width, dim=-1) if part.axis == "heads" else gates.channels(part)
            for part in parts
        ]
        return values[0] if len(values) == 1 else prod(values[1:], start=values[0])

    return gate


def _gated_linear_(model: nn.Module, name: str, gates: Gates) -> GatedLinear:
    """The gated linear of that name; put there where there is none yet."""
    linear = linear_at(model, name)
    if isinstance(linear, GatedLinear):
        return linear
    gated = GatedLinear(linear)
    gates.replaced[name] = swap_(model, name, gated)
    return gated


def remove_gates_(model: nn.Module, gates: Gates) -> nn.Module:
    """Back to the dense state: what was there before, with the weights as they are now."""
    for name, module in gates.replaced.items():
        swap_(model, name, module)
    gates.replaced.clear()
    return model


def harden_(gates: Gates, plan: ChannelPlan) -> None:
    """Sets every gate to the 0/1 mask of a plan."""
    gates.harden_(plan_mask(gates, plan))


def plan_mask(gates: Gates, plan: ChannelPlan) -> Tensor:
    """(n,) ones where a plan keeps a gate's channels."""
    entries = {kept.key: kept for kept in plan.groups}
    mask = torch.zeros(gates.logits.shape)
    for group, part in gates:
        kept = entries[group.site, "attn_value" if group.axis == "heads" else group.axis]
        if group.axis == "heads":
            mask[part][list(kept.kept_heads)] = 1
            continue
        by_channel = torch.zeros(group.heads, group.width)
        for head, channels in zip(kept.kept_heads, kept.channels, strict=True):
            by_channel[head, list(channels)] = 1
        units = [group.channels([unit])[0] for unit in range(group.units)]
        mask[part] = by_channel[:, units].flatten()
    return mask.to(gates.logits)
