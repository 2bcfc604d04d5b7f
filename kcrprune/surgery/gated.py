"""Dense to gated and back: linears whose inputs, their innovations or outputs are multiplied by gates."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite, family_of
from kcrprune.method.gates import ChannelGate, Gates, QkvGate
from kcrprune.method.innovations import Innovations
from kcrprune.plan import Axis, BlockPlan, ChannelPlan
from kcrprune.surgery.pruned import head_rows
from kcrprune.surgery.swap import linear_at, swap_


class GatedLinear(nn.Linear):
    """A linear with gates on its inputs, its outputs or both; weight and bias are those of the dense one.

    With `innovations` the gates act on those of the inputs, so that closing them along their order is a cut with its
    refit. They belong to the network as it is: where its weights train on, they age.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        in_gate: nn.Module | None = None,
        out_gate: nn.Module | None = None,
        innovations: Innovations | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.in_gate, self.out_gate = in_gate, out_gate
        self.innovations = innovations

    def forward(self, input: Tensor) -> Tensor:
        """out_gate * (W (in_gate * input) + b), or out_gate * (W input + b - W B ((1 - in_gate) * innovations))."""
        if self.in_gate is None:
            output = super().forward(input)
        elif self.innovations is None:
            output = super().forward(_times(input, self.in_gate()))
        else:
            output = super().forward(input)
            output = output - self._closed(input, 1 - self.in_gate(), self.innovations).to(output.dtype)
        return output if self.out_gate is None else _times(output, self.out_gate())

    def _closed(self, input: Tensor, closed: Tensor, innovations: Innovations) -> Tensor:
        """What the closed gates hold back of the output; in float32, since A and B are no well-conditioned matrices."""
        with torch.autocast(input.device.type, enabled=False):
            held = _times(nn.functional.linear(input.float() - innovations.mean, innovations.analysis), closed)
            return nn.functional.linear(held, self.weight.float() @ innovations.synthesis)


def _times(x: Tensor, gate: Tensor) -> Tensor:
    """Product of x (rows, ..., C) and a gate: (C,) for all, or (B, C) with an image's windows in adjacent rows."""
    if gate.ndim == 2:
        gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
        gate = gate.view(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return x * gate.to(x.dtype)


def is_open(site: BlockSite, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns such as `blocks.1*` allow this block to be cut."""
    return (not include or matches(site, include)) and not matches(site, exclude)


def matches(site: BlockSite, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is the block's name, with `*` and `?` as in a shell."""
    return any(fnmatchcase(site.name, pattern) for pattern in patterns)


def add_gates_(
    model: nn.Module,
    axes: Sequence[Axis],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    innovations: Mapping[str, Innovations] | None = None,
) -> Gates:
    """Puts gates on the axes that each open block allows; all gates start open, and the output is unchanged.

    `innovations` by name of a linear: its gates act on them (fc2 for `mlp_hidden`, proj for `attn_value`).
    """
    sites = family_of(model).sites(model)
    device = next(model.parameters()).device
    by_site = {}
    for site in sites:
        if is_open(site, include, exclude):
            allowed: list[Axis] = [axis for axis in axes if axis in site.axes]
            by_site[site.name] = _gate_block_(model, site, allowed, device, innovations or {})
    return Gates(sites, by_site)


def _gate_block_(
    model: nn.Module,
    site: BlockSite,
    axes: Sequence[Axis],
    device: torch.device,
    innovations: Mapping[str, Innovations],
) -> dict[Axis, ChannelGate]:
    gates: dict[Axis, ChannelGate] = {axis: ChannelGate(axis_channels(site, axis), device) for axis in axes}
    io, hidden = gates.get("mlp_io"), gates.get("mlp_hidden")
    if io is not None:
        swap_(model, site.fc1, GatedLinear(linear_at(model, site.fc1), in_gate=io))
    if io is not None or hidden is not None:
        fc2 = GatedLinear(
            linear_at(model, site.fc2), in_gate=hidden, out_gate=io, innovations=innovations.get(site.fc2)
        )
        swap_(model, site.fc2, fc2)
    query, value, heads = gates.get("attn_query"), gates.get("attn_value"), gates.get("heads")
    if value is not None and site.proj in innovations:
        proj = GatedLinear(linear_at(model, site.proj), in_gate=value, innovations=innovations[site.proj])
        swap_(model, site.proj, proj)
        value = None
    if query is not None or value is not None or heads is not None:
        gate = QkvGate(query, value, heads, site.head_dim)
        swap_(model, site.qkv, GatedLinear(linear_at(model, site.qkv), out_gate=gate))
    return gates


def axis_channels(site: BlockSite, axis: Axis) -> int:
    """Number of gates of one axis of a block."""
    inner = site.heads * site.head_dim
    widths: dict[Axis, int] = {
        "mlp_io": site.width,
        "mlp_hidden": site.hidden,
        "attn_query": inner,
        "attn_value": inner,
        "heads": site.heads,
    }
    return widths[axis]


def remove_gates_(model: nn.Module, gates: Gates) -> nn.Module:
    """Back to the dense state: each gated linear becomes a plain one with the same weights."""
    for site in gates.sites:
        for name in (site.fc1, site.fc2, site.qkv, site.proj):
            linear = linear_at(model, name)
            if isinstance(linear, GatedLinear):
                plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
                plain.weight, plain.bias = linear.weight, linear.bias
                swap_(model, name, plain)
    return model


def harden_(gates: Gates, plan: ChannelPlan) -> None:
    """Sets every gate to the 0/1 mask of a plan."""
    blocks = {block.site: block for block in plan.blocks}
    for site, axis, gate in gates:
        mask = torch.zeros_like(gate.logits)
        mask[_kept_positions(blocks[site.name], axis, site.head_dim)] = 1
        gate.harden_(mask)


def _kept_positions(block: BlockPlan, axis: Axis, head_dim: int) -> list[int]:
    if axis == "attn_query" or axis == "attn_value":
        return head_rows(block.heads.indices, getattr(block, axis), head_dim)
    return list(getattr(block, axis).indices)
