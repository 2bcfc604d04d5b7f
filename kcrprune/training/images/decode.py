"""From a file to an image of 8 bits a channel, or a sentence that names what cannot be one."""

from typing import Any

import numpy as np
from PIL import Image

from kcrprune.errors import DataError


def decoded(file: Any, name: str, *, pixels: bool = True) -> Image.Image:
    """The image in an open file, which is closed; without `pixels` its header alone. DataError where there is none."""
    with file:
        try:
            image = Image.open(file)
            if pixels:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} is not an image that can be read ({first_line(error)}); remove it") from error
    return image


def require_range(image: Image.Image, name: str) -> None:
    """DataError for pixels that do not tell which of their values are black and white."""
    if image.mode in ("I", "F") and not _has_16_bits(image):
        raise DataError(
            f"{name} has pixels of 32 bits (mode {image.mode}), which do not tell black and white; save it with 8 or 16"
        )


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
