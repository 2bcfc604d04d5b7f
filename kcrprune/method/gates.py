"""Channel gates: learned logits, Gumbel noise, temperature.

Letters: a logits, t temperature, B images of a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite
from kcrprune.plan import Axis


class ChannelGate(nn.Module):
    """One gate for each channel of one axis of one block.

    `logits` are learned. `value` is what the network multiplies by: (channels,) after a sample, (B, channels) while
    each image has gates of its own. Nothing changes it but the explicit calls below.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels, device=device))
        self.value = torch.ones(channels, device=device)

    def forward(self) -> Tensor:
        """The current value."""
        return self.value

    @property
    def keep_probability(self) -> Tensor:
        """P(gate > 1/2) = sigmoid(a), at any temperature; differentiable in the logits."""
        return self.logits.sigmoid()

    def sample_(self, temperature: float, generator: torch.Generator) -> None:
        """Sets value = sigmoid((a + e1 - e0) / t) with e0, e1 ~ Gumbel(0, 1), so e1 - e0 ~ Logistic(0, 1)."""
        uniform = torch.rand(self.logits.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
        logistic = (uniform.log() - (1 - uniform).log()).to(self.logits.device)
        self.value = ((self.logits + logistic) / temperature).sigmoid()

    def harden_(self, mask: Tensor) -> None:
        """Sets value = mask, zeros and ones (channels,)."""
        self.value = mask.to(self.logits)

    def open_per_image_(self, images: int) -> None:
        """Sets value = ones (B, channels), a leaf whose gradient tells what each channel means to each image."""
        self.value = torch.ones(images, *self.logits.shape, device=self.logits.device, requires_grad=True)


class QkvGate(nn.Module):
    """The gates on the outputs of a qkv linear: q rows, ones for k rows, v rows times their head's gate.

    A gated q channel removes its product with k, so k needs no gate of its own.
    """

    def __init__(
        self, query: ChannelGate | None, value: ChannelGate | None, heads: ChannelGate | None, dim: int
    ) -> None:
        super().__init__()
        self.query, self.value, self.heads = query, value, heads
        self.dim = dim  # channels of one head

    def forward(self) -> Tensor:
        """(3 * h * d,) or (B, 3 * h * d)."""
        parts = [gate() for gate in (self.query, self.value) if gate is not None]
        if self.heads is not None:
            parts.append(self.heads().repeat_interleave(self.dim, dim=-1))
        ones = torch.ones_like(parts[0])
        query = self.query() if self.query is not None else ones
        value = self.value() if self.value is not None else ones
        if self.heads is not None:
            value = value * parts[-1]
        return torch.cat([query, ones, value], dim=-1)


@dataclass(frozen=True)
class Gates:
    """All gates of a gated model, by block site and axis.

    Gates of the attention axes are flat, (h * d,); `shaped` gives them their (h, d) shape.
    """

    sites: tuple[BlockSite, ...]
    by_site: Mapping[str, Mapping[Axis, ChannelGate]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[BlockSite, Axis, ChannelGate]]:
        for site in self.sites:
            for axis, gate in self.at(site).items():
                yield site, axis, gate

    def at(self, site: BlockSite) -> Mapping[Axis, ChannelGate]:
        """The gates of one block, by axis."""
        return self.by_site.get(site.name, {})

    def parameters(self) -> list[nn.Parameter]:
        """The logits, for an optimiser."""
        return [gate.logits for _, _, gate in self]

    def shaped(self, site: BlockSite, axis: Axis, flat: Tensor) -> Tensor:
        """`flat` per channel as (channels,), or (h, d) for the attention axes."""
        return flat.view(site.heads, site.head_dim) if axis in ("attn_query", "attn_value") else flat

    def sample_(self, temperature: float, generator: torch.Generator) -> None:
        """One sample of every gate, shared by each of its uses until the next call."""
        for _, _, gate in self:
            gate.sample_(temperature, generator)

    def open_per_image_(self, images: int) -> None:
        """Every gate open, with a gradient an image."""
        for _, _, gate in self:
            gate.open_per_image_(images)


def temperature_at(step: int, steps: int, first: float, floor: float) -> float:
    """Geometric schedule from `first` at step 0 to `floor` at the last step."""
    progress = step / max(1, steps - 1)
    return max(floor, first * (floor / first) ** progress)
