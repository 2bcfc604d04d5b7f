"""Channel gates: learned logits, Gumbel noise, temperature.

All gates of a network are one flat parameter, and a group's gates are a slice of it: one draw of noise, one step of an
optimiser, one shift to the budget.

Letters: a logits, t temperature, B images of a batch, n gates.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kcrprune.families import Group, Key
from kcrprune.plan import PER_HEAD


class Gates:
    """The gates of some groups; `logits` (n,) are learned.

    `value` is what the network multiplies by: (n,) after a sample, (B, n) while each image has gates of its own.
    Nothing changes it but the explicit calls below.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.groups = tuple(groups)
        self.slices: dict[Key, slice] = {}
        count = 0
        for group in self.groups:
            self.slices[group.key] = slice(count, count := count + group.heads * group.units)
        self.logits = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))
        self.value = torch.ones(count, device=device, dtype=dtype)
        self.replaced: dict[str, nn.Module] = {}  # by name, what surgery put gated modules in the place of

    def __iter__(self) -> Iterator[tuple[Group, slice]]:
        return ((group, self.slices[group.key]) for group in self.groups)

    def channels(self, group: Group) -> Tensor:
        """The value of each channel of a group, (heads * width,) or (B, heads * width)."""
        return group.spread(self.value[..., self.slices[group.key]])

    def by_group(self, flat: Tensor) -> dict[Key, Tensor]:
        """(n,) as a tensor a group: (units,), or (h, units) for the axes inside heads."""
        return {group.key: _shaped(group, flat[part]) for group, part in self}

    def flat(self, by_group: Mapping[Key, Tensor]) -> Tensor:
        """The inverse of `by_group`, on the device of the logits."""
        return torch.cat([by_group[group.key].flatten() for group in self.groups]).to(self.logits)

    def sample_(self, temperature: float, noise: Tensor) -> None:
        """Sets value = sigmoid((a + e1 - e0) / t), shared by every use until the next call.

        `noise` (n,) is uniform in 0..1, and e1 - e0 of two Gumbel(0, 1) is Logistic(0, 1).
        """
        uniform = noise.clamp(1e-6, 1 - 1e-6).to(self.logits, non_blocking=True)
        self.value = ((self.logits + uniform.log() - (-uniform).log1p()) / temperature).sigmoid()

    def harden_(self, mask: Tensor) -> None:
        """Sets value = mask, zeros and ones (n,)."""
        self.value = mask.to(self.logits)

    def open_per_image_(self, images: int) -> None:
        """Sets value = ones (B, n), a leaf whose gradient tells what each gate means to each image."""
        self.value = self.logits.new_ones(images, len(self.logits)).requires_grad_(True)


def _shaped(group: Group, flat: Tensor) -> Tensor:
    return flat.view(group.heads, -1) if group.axis in PER_HEAD else flat


def temperature_at(step: float, steps: int, first: float, floor: float) -> float:
    """Geometric schedule from `first` at step 0 to `floor` at the last step."""
    progress = step / max(1, steps - 1)
    return max(floor, first * (floor / first) ** progress)
