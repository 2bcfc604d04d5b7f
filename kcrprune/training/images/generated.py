"""Generated images: occluding textured shapes before 1/f noise, for networks that are compressed without any data.

They share what matters with photographs: spectra near 1/f, sharp and blurred edges at all scales by occlusion
("dead leaves", radii with density r^-3: Lee, Mumford and Huang 2001), few dominant colours, shading and light that
varies over the image. The figures below are choices of ours.

Letters: H height, W width, h and w those of the box around one shape.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kcrprune.surgery.kept import zeros_in_file
from kcrprune.training.randomness import number

Floats = NDArray[np.floating]

STAGE: Final = "generate"  # of the addresses of images

# luminance, red-green and blue-yellow to RGB, scaled as they vary in photographs
OPPONENT: Final = np.array([[1, 1, 1], [0.25, -0.25, 0], [0.15, 0.15, -0.3]], dtype=np.float32)
LARGEST: Final = 0.45  # radius of the largest shape, as a share of the shorter side


@dataclass(frozen=True)
class Kind:
    """A kind of image: how many shapes (from, to), their smallest radius in shorter sides, exponent of the noise."""

    shapes: tuple[int, int]
    smallest: float
    exponent: tuple[float, float]


LEAVES: Final = Kind(shapes=(30, 90), smallest=0.03, exponent=(0.8, 1.6))
OBJECTS: Final = Kind(shapes=(2, 12), smallest=0.12, exponent=(1.0, 2.0))
NOISE: Final = Kind(shapes=(0, 1), smallest=0.2, exponent=(0.6, 1.8))
KINDS: Final = (LEAVES, OBJECTS, NOISE)
SHARES: Final = (0.55, 0.35, 0.1)


class GeneratedImages(Dataset[Tensor]):
    """`count` colour images (3, H, W) in 0..1, of 8 bits; image i depends on the seed, i and the size alone.

    With a folder for `kept`, each is made once, by whichever process asks first, and lies in a file there that has no
    name any more; where the disk has no room, each is made whenever it is asked for.
    """

    def __init__(self, count: int, size: tuple[int, int], seed: int, kept: Path | None = None) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.made: tuple[Tensor, Tensor] | None = None  # (count, 3, H, W) in 0..255, and (count,) whether it is there
        if kept is not None:
            with suppress(OSError):
                images = zeros_in_file(kept, (count, 3, *size), torch.uint8)
                self.made = images, zeros_in_file(kept, (count,), torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        if self.made is None:
            return self._generated(index).float() / 255
        images, there = self.made
        if not there[index]:
            images[index] = self._generated(index)
            there[index] = 1
        return images[index].float() / 255

    def _generated(self, index: int) -> Tensor:
        random = np.random.default_rng(number(self.seed, STAGE, index, "image"))
        return torch.from_numpy(np.rint(255 * generate(random, self.size)).astype(np.uint8))


def generate(random: np.random.Generator, size: tuple[int, int]) -> Floats:
    """One image (3, H, W) in 0..1."""
    kind = KINDS[random.choice(len(KINDS), p=SHARES)]
    noise = one_over_f(random, size, random.uniform(*kind.exponent))  # (3, H, W)
    palette = random.uniform(0.05, 0.95, (int(random.integers(2, 7)), 1)).astype(np.float32)
    palette = palette + _colours(random, len(palette))  # (colours, 3)
    image = palette[0][:, None, None] + random.uniform(0.05, 0.3) * noise
    radii = _radii(random, kind, min(size))
    for radius in np.sort(radii)[::-1] if random.random() < 0.5 else radii:
        paint_(image, noise, radius, palette[random.integers(len(palette))], random)
    return _exposed(image, random)


def one_over_f(random: np.random.Generator, size: tuple[int, int], exponent: float) -> Floats:
    """Coloured noise (3, H, W) of mean 0 and variance 1, its amplitude falling with frequency^exponent."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1) ** -exponent, 0).astype(np.float32)
    normal = random.standard_normal((2, 3, *amplitude.shape), dtype=np.float32)
    noise = np.fft.irfft2((normal[0] + 1j * normal[1]) * amplitude, s=size).astype(np.float32)
    noise /= np.maximum(noise.std(axis=(1, 2), keepdims=True), 1e-9)  # a single pixel has no variance
    coloured = np.tensordot(OPPONENT.T, noise, axes=1)
    return coloured / np.maximum(coloured.std(), 1e-9)


def paint_(image: Floats, texture: Floats, radius: float, colour: Floats, random: np.random.Generator) -> None:
    """Paints one shape of about `radius` pixels somewhere over the image."""
    height, width = image.shape[1:]
    center = random.uniform((0, 0), (height, width))
    long, short = radius * random.uniform(1, 1.5), radius * random.uniform(0.5, 1)
    blur = random.uniform(2, 6) if random.random() < 0.2 else 1.0  # pixels from outside to inside
    rows, columns = (
        _extent(middle, 1.5 * long + blur, end) for middle, end in zip(center, (height, width), strict=True)
    )
    angle = random.uniform(0, 2 * np.pi)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - center[0])
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - center[1])
    u = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(long)  # (h, w)
    v = (y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))) / np.float32(short)
    inside = np.clip(0.5 - _outside(u, v, random) * np.float32(short / blur), 0, 1)  # (h, w)
    surface = _surface(u, v, colour, texture, random)  # (3, h, w)
    box = image[:, rows, columns]
    box += inside * (surface - box)


def _outside(u: Floats, v: Floats, random: np.random.Generator) -> Floats:
    """How far outside a shape of radius 1 a point is, negative inside: an ellipse, a rectangle or a convex polygon."""
    shape = random.random()
    if shape < 0.5:
        return np.sqrt(u * u + v * v) - 1
    if shape < 0.7:
        return np.maximum(np.abs(u), np.abs(v)) - 1
    sides = int(random.integers(3, 7))
    turns = 2 * np.pi * (np.arange(sides) + random.uniform(-0.3, 0.3, sides)) / sides
    far = random.uniform(0.5, 0.9, sides)
    planes = [
        u * np.float32(np.cos(a)) + v * np.float32(np.sin(a)) - np.float32(d) for a, d in zip(turns, far, strict=True)
    ]
    return np.maximum.reduce(planes)


def _surface(u: Floats, v: Floats, colour: Floats, texture: Floats, random: np.random.Generator) -> Floats:
    """The colours (3, h, w) of a shape: its own colour, shaded, under a texture or stripes of random contrast."""
    height, width = u.shape
    finer = random.random() < 0.4 and 2 * height <= texture.shape[1] and 2 * width <= texture.shape[2]
    step = 2 if finer else 1
    top = int(random.integers(0, texture.shape[1] - step * height + 1))
    left = int(random.integers(0, texture.shape[2] - step * width + 1))
    grain = texture[:, top : top + step * height : step, left : left + step * width : step]
    slope = np.float32(random.normal(0, 0.15))
    shade = slope * u - np.float32(random.uniform(0, 0.2)) * (u * u + v * v)  # (h, w)
    if random.random() < 0.2:
        waves = random.uniform(2, 12)
        shade += np.float32(random.uniform(0.05, 0.3)) * np.sin(np.float32(waves) * (u if slope > 0 else v))
    contrast = np.float32(0.3 * random.random() ** 2)
    return (colour + _colours(random, 1)[0] * 0.3)[:, None, None] + shade + contrast * grain


def _colours(random: np.random.Generator, count: int) -> Floats:
    """Random departures (count, 3) from grey."""
    strength = random.normal(0, 0.35, (count, 3)).astype(np.float32) * np.array([0, 1, 1], dtype=np.float32)
    return strength @ OPPONENT


def _radii(random: np.random.Generator, kind: Kind, side: int) -> Floats:
    """Radii in pixels with density r^-3 between the kind's smallest (at least a pixel) and the largest."""
    count = int(random.integers(kind.shapes[0], kind.shapes[1] + 1))
    low, high = max(1.0, kind.smallest * side), max(1.5, LARGEST * side)
    return ((high**-2 + random.random(count) * (low**-2 - high**-2)) ** -0.5).astype(np.float32)


def _extent(middle: float, reach: float, end: int) -> slice:
    """The pixels within `reach` of `middle`, at least one, inside 0..end."""
    start = min(max(0, int(middle - reach)), end - 1)
    return slice(start, max(start + 1, min(end, int(middle + reach) + 1)))


def _exposed(image: Floats, random: np.random.Generator) -> Floats:
    """The image under uneven light, with a random contrast and brightness, sometimes grey or out of focus; in 0..1."""
    height, width = image.shape[1:]
    across, down = random.normal(0, 0.15, 2).astype(np.float32)
    light = (
        1
        + across * np.linspace(-1, 1, width, dtype=np.float32)
        + down * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    )
    image = image * light
    middle = image.mean()
    contrast = random.uniform(0.15, 0.3) / max(float(image.std()), 1e-3)
    image = (image - middle) * np.float32(contrast) + np.float32(random.normal(0.46, 0.1))
    if random.random() < 0.05:
        image = np.broadcast_to(image.mean(axis=0), image.shape)
    if random.random() < 0.25:
        image = _soft(_soft(image, axis=1), axis=2)
    return np.clip(image, 0, 1).astype(np.float32)


def _soft(image: Floats, axis: int) -> Floats:
    """The image blurred by (1, 2, 1) / 4 along an axis, periodic at the border."""
    return (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
