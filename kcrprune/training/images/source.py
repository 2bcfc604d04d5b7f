"""Images and labels by index, where they lie: each decoded when it is asked for, and errors told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from PIL import Image

from kcrprune.errors import DataError
from kcrprune.training.images.decode import decoded, in_mode, require_range, unreadable, whole
from kcrprune.training.images.labels import match_classes

MODES: Final = {1: "L", 3: "RGB"}  # PIL's name of an image with so many channels


@dataclass(frozen=True)
class Source:
    """Images by index: `items` gives (image or open file, label); `class_indices` is None where there are no labels."""

    items: Sequence[tuple[Any, int]]
    mode: str
    class_indices: Mapping[str, int] | None
    place: str
    told: str | None = None  # a sentence on files that were passed over
    renumbered: Mapping[int, int] | None = None  # the label of an item's label; None: the same

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
        return tuple(str(name) for name, _ in sorted(self.class_indices.items(), key=lambda item: item[1]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label, -1 without labels; ImageError names a file that is not an image."""
        item, label, name = self._item(index)
        image = whole(item, name) if isinstance(item, Image.Image) else decoded(item, name)
        label = int(label) if self.labelled else -1
        return in_mode(image, self.mode, name), label if self.renumbered is None else self.renumbered[label]

    def probe(self, index: int) -> None:
        """Reads the header of a file; ImageError where it is none of an image."""
        item, _, name = self._item(index)
        require_range(decoded(item, name, pixels=False), name)

    def fits(self, count: int) -> bool:
        """True where the labels are those of a network with `count` classes."""
        indices = self.class_indices or {}
        return len(indices) == count > max(indices.values(), default=0)

    def for_network(self, count: int, names: Sequence[str] | None, *, some: bool = False) -> Self:
        """With the labels of a network of `count` classes, by their names where it has `names`, else in order.

        `some` of its classes suffice where names tell which. DataError where they do not fit.
        """
        own = self.class_indices or {}
        found = match_classes(own, names, self.place) if names and len(names) == count else None
        if not self.fits(count) and not (found and some):
            raise DataError(
                f"{self.place} has {len(own)} classes and the network {count}; name the data that the network was made "
                "for, map its classes with --class-map, or ignore the labels with --no-labels"
            )
        if found is None:
            return self
        step = {own[name]: index for name, index in found.items()}
        whole = step if self.renumbered is None else {first: step[last] for first, last in self.renumbered.items()}
        return replace(self, class_indices=found, renumbered=whole)

    def _item(self, index: int) -> tuple[Any, int, str]:
        """Image or open file, label and name."""
        try:
            item, label = self.items[index]
        except OSError as error:  # gone meanwhile, or not ours to read
            raise unreadable(error.filename or self._name(index), error) from error
        return item, label, getattr(item, "name", None) or self._name(index)

    def _name(self, index: int) -> str:
        return f"image {index} of {self.place}"


def mode_of(channels: int) -> str:
    """PIL's name of images with so many channels; DataError where there is none."""
    if channels not in MODES:
        raise DataError(f"the network takes images of {channels} channels; images can be read with 1 or 3")
    return MODES[channels]
