"""From a decoded image to a network's input, augmented or as the network is used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from kcrprune.plan import Preprocessing

SHIFT: Final = 1 / 8  # largest shift by the augmentation, as a share of the side: 4 of 32 pixels, as usual for CIFAR

Transform = Callable[[Image.Image], Tensor]


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """The evaluation transform of timm; an image that has the input's size already is neither scaled nor cut."""
    steps = _timm_steps(preprocessing)
    as_it_is, scaled = transforms.Compose(steps[2:]), transforms.Compose(steps)
    return _BySize(preprocessing, as_it_is, scaled)


def training_transform(preprocessing: Preprocessing, hflip: float = 0.5) -> Transform:
    """The evaluation transform with a random shift in place of the centre crop, and a share `hflip` of images mirrored.

    Gentle on purpose: a refitted network wants the images that its dense network knows, and larger changes of scale
    cost accuracy in trials.
    """
    resize, _, *to_tensor = _timm_steps(preprocessing)
    height, width = preprocessing.input_size[1:]
    margin = round(min(height, width) * (1 / preprocessing.crop_pct - 1) / 2)  # what the centre crop cuts off

    def steps(first: list[Any], padding: int) -> Transform:
        crop = transforms.RandomCrop((height, width), padding, pad_if_needed=True, padding_mode="reflect")
        return transforms.Compose([*first, crop, transforms.RandomHorizontalFlip(hflip), *to_tensor])

    shift = round(SHIFT * min(height, width))
    return _BySize(preprocessing, steps([], shift), steps([resize], max(0, shift - margin)))


def _timm_steps(preprocessing: Preprocessing) -> list[Any]:
    """Resize, centre crop, tensor, normalisation."""
    transform: Any = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    return transform.transforms


@dataclass(frozen=True)
class _BySize:
    """One transform for images of the input's size, another for all others."""

    preprocessing: Preprocessing
    same: Transform
    other: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.preprocessing.input_size[1:]
        return self.same(image) if image.size == (width, height) else self.other(image)
