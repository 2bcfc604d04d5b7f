"""CIFAR-10 as tensors, for the scripts that train on it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of folder/CLASS/*.png as (n, 3, 32, 32) uint8 and their labels (n,), in the order of the file names."""
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])  # (n, 32, 32, 3)
    labels = [classes.index(path.parent.name) for path in files]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images in 0..255 as normalised floats."""
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.inference_mode()
def accuracy(model: nn.Module, prepare: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent of a network that takes what `prepare` makes of images; in eval mode, where it stays."""
    model.eval()
    hits = 0
    for batch, truth in zip(images.split(200), labels.split(200), strict=True):
        hits += int((model(prepare(batch)).argmax(1) == truth).sum())
    return 100 * hits / len(labels)
