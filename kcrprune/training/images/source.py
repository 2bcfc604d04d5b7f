"""Images and labels by index, where they lie: each decoded when it is asked for, and errors told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

from kcrprune.errors import DataError

MODES: Final = {1: "L", 3: "RGB"}  # PIL's name of an image with so many channels
PROBED: Final = 256  # headers that are read at once, so that a wrong file shows before anything is trained


@dataclass(frozen=True)
class Source:
    """Images by index: `items` gives (image or open file, label); `class_indices` is None where there are no labels."""

    items: Sequence[tuple[Any, int]]
    mode: str
    class_indices: Mapping[str, int] | None
    place: str

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labelled(self) -> bool:
        """True where the images have labels."""
        return self.class_indices is not None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in the order of the labels; None without labels."""
        if self.class_indices is None:
            return None
        return tuple(str(name) for name in sorted(self.class_indices, key=lambda name: self.class_indices[name]))  # type: ignore[index]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label, -1 without labels; DataError names a file that is not an image."""
        item, label = self.items[index]
        if not isinstance(item, Image.Image):
            item = self._decoded(item, index)
        return item.convert(self.mode), int(label) if self.labelled else -1

    def probe(self) -> None:
        """Reads the headers of a few files, evenly spread; DataError for the first that is not an image."""
        for index in range(0, len(self), max(1, len(self) // PROBED)):
            item = self.items[index][0]
            if not isinstance(item, Image.Image):
                self._decoded(item, index, pixels=False)

    def fits(self, count: int) -> bool:
        """True where the labels are those of a network with `count` classes."""
        indices = self.class_indices or {}
        return len(indices) == count > max(indices.values(), default=0)

    def check_classes(self, count: int) -> None:
        """DataError unless the labels fit a network with `count` classes."""
        if not self.fits(count):
            raise DataError(
                f"{self.place} has {len(self.class_indices or {})} classes and the network {count}; name the data that "
                "the network was made for, map its classes with --class-map, or ignore the labels with --no-labels"
            )

    def _decoded(self, file: Any, index: int, *, pixels: bool = True) -> Image.Image:
        with file:
            try:
                image = Image.open(file)
                if pixels:
                    image.load()
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                name = getattr(file, "name", None) or f"image {index} of {self.place}"
                raise DataError(f"{name} is not an image that can be read ({first_line(error)}); remove it") from error
        return image


def mode_of(channels: int) -> str:
    """PIL's name of images with so many channels; DataError where there is none."""
    if channels not in MODES:
        raise DataError(f"the network takes images of {channels} channels; images can be read with 1 or 3")
    return MODES[channels]


def first_line(error: BaseException) -> str:
    """An error's text without what follows its first line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
