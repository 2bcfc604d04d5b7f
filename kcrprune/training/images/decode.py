"""From a file to an image of 8 bits a channel, or a sentence that names what cannot be one."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from kcrprune.errors import ImageError

T = TypeVar("T")


def decoded(file: Any, name: str, *, pixels: bool = True) -> Image.Image:
    """The image in an open file, which is closed; without `pixels` its header alone. ImageError where there is none."""
    with file:
        image = _attempted(lambda: Image.open(file), name)
        return whole(image, name) if pixels else image


def whole(image: Image.Image, name: str) -> Image.Image:
    """The image with its pixels read; ImageError where they cannot be."""
    _attempted(image.load, name)
    return image


def _attempted(read: Callable[[], T], name: str) -> T:
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise what they like: struct.error, EOFError, KeyError
        raise unreadable(name, error) from error


def require_range(image: Image.Image, name: str) -> None:
    """ImageError for pixels that do not tell which of their values are black and white."""
    if image.mode in ("I", "F") and not _has_16_bits(image):
        told = f"pixels of 32 bits (mode {image.mode}), which do not tell black and white; save it with 8 or 16"
        raise ImageError(f"{name} has {told}", name)


def unreadable(name: str, error: Exception) -> ImageError:
    """The sentence about an image that cannot be read."""
    return ImageError(f"{name} is not an image that can be read ({first_line(error)}); remove it", name)


def in_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    """The image as `mode`, L or RGB; 16 bits are scaled by their range, where Pillow would clip them at 255."""
    require_range(image, name)
    if _has_16_bits(image):
        image = Image.fromarray(
            (np.asarray(image).astype(np.float32) / 257 + 0.5).astype(np.uint8)
        )  # 65535 / 257 = 255
    return image.convert(mode)


def _has_16_bits(image: Image.Image) -> bool:
    # PNG and PPM of 16 bits fill Pillow's mode of 32 bits, over the whole range of 16
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def first_line(error: BaseException) -> str:
    """An error's text without what follows its first line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
