"""Images of squares, discs and crosses on noise, each with its class, its box and its mask: data that anybody has."""

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = ("square", "disc", "cross")


@dataclass(frozen=True)
class Scenes:
    """One shape an image: (n, 3, H, W), classes (n,), boxes (n, 4) as x0, y0, x1, y1, masks (n, H, W)."""

    images: Tensor
    classes: Tensor
    boxes: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def scenes(count: int, size: tuple[int, int], seed: int = 0) -> Scenes:
    """As many images, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size
    classes = torch.randint(len(CLASSES), (count,), generator=draw)
    radius = (0.15 + 0.15 * torch.rand(count, generator=draw)) * min(size)
    x, y = (radius + torch.rand(count, generator=draw) * (side - 2 * radius) for side in (width, height))
    across = torch.arange(width) + 0.5 - x[:, None]  # (n, W)
    down = torch.arange(height) + 0.5 - y[:, None]
    far_x, far_y = (each.abs() / radius[:, None] for each in (across, down))
    far = torch.stack((far_x[:, None, :].expand(-1, height, -1), far_y[:, :, None].expand(-1, -1, width)))
    kinds = torch.stack((far.amax(0) <= 1, far.square().sum(0) <= 1, (far.amin(0) <= 0.3) & (far.amax(0) <= 1)))
    masks = kinds[classes, torch.arange(count)]
    colours = torch.rand(count, 3, 1, 1, generator=draw) + 0.5
    images = 0.2 * torch.randn(count, 3, height, width, generator=draw) + colours * masks[:, None]
    boxes = torch.stack((x - radius, y - radius, x + radius, y + radius), 1)
    return Scenes(images, classes, boxes, masks.long())
