"""Images and labels where they lie: folders, tar files and timm's other datasets, opened so that errors are told."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch.utils.data import IterableDataset

from kcrprune.errors import DataError

TRAIN_FOLDERS: Final = ("train", "training")
EVALUATION_FOLDERS: Final = ("validation", "val", "valid", "test", "eval", "evaluation")
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
                raise DataError(f"{name} is not an image that can be read ({_first_line(error)}); remove it") from error
        return image


class Stream(IterableDataset):
    """Images that come in order, of unknown number, as tensors."""

    def __init__(self, items: Iterable[tuple[Image.Image, int]], mode: str, transform: Callable) -> None:
        self.items, self.mode, self.transform = items, mode, transform

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, label in self.items:
            yield self.transform(image.convert(self.mode)), int(label)


def open_folder(root: Path, class_map: str | None, channels: int) -> Source:
    """A folder of class folders, a folder of images without labels, or a tar file of either."""
    items = _opened("", str(root), "", class_map).reader
    indices = dict(items.class_name_to_idx if root.is_file() else items.class_to_idx)
    flat = indices.keys() & {"", "."}  # what timm calls the class of images that lie in no folder
    if flat and len(indices) > 1:
        raise DataError(f"{root} holds images beside its class folders; move them into one, or name a folder below it")
    source = Source(items, _mode(channels), None if flat else indices, str(root))
    if not root.is_file():  # a tar file would stay open, and processes that load images must not share it
        source.probe()
    return source


def open_folders(
    root: Path, splits: tuple[str, str], class_map: str | None, channels: int
) -> tuple[Source, Source | None]:
    """The training images below `root` and, where a folder for it is there, the evaluation images.

    The evaluation images get the labels of the training folder's class names.
    """
    train, evaluation = split_folder(root, splits[0], TRAIN_FOLDERS), split_folder(root, splits[1], EVALUATION_FOLDERS)
    if train is None and evaluation is not None:
        raise DataError(f"{root} has {evaluation.name!r} but no folder 'train'; add one, or name {evaluation} itself")
    training = open_folder(train or root, class_map, channels)
    if evaluation is None:
        return training, None
    held_out = open_folder(evaluation, class_map, channels)
    if training.class_indices is None or held_out.class_indices is None:
        return training, held_out
    extra = sorted(held_out.class_indices.keys() - training.class_indices.keys())
    if extra:
        raise DataError(
            f"{evaluation} has a class {extra[0]!r} that {train} lacks; the two need the same class folders"
        )
    if held_out.class_indices != training.class_indices:
        items = _opened("", str(evaluation), "", dict(training.class_indices)).reader
        held_out = Source(items, held_out.mode, training.class_indices, held_out.place)
    return training, held_out


def open_named(
    dataset: str, root: str | None, split: str, class_map: str | None, channels: int, *, keep: int
) -> Source:
    """One of timm's named datasets (torch/, hfds/, wds/, ...); of a stream the first `keep` images, held in memory."""
    found = _opened(dataset, root, split, class_map)
    place = f"{dataset} ({split})"
    indices = getattr(found, "class_to_idx", None) or getattr(getattr(found, "reader", None), "class_to_idx", None)
    if isinstance(found, IterableDataset):
        items = _attempted(lambda: list(islice(found, keep)), dataset)
        source = Source(items, _mode(channels), indices or _numbered(items), place)
    else:
        source = Source(getattr(found, "reader", found), _mode(channels), indices, place)
    if len(source) == 0:
        raise DataError(f"{place} holds no images; name a dataset and a split that do")
    return source


def open_stream(
    dataset: str, root: str | None, split: str, class_map: str | None, channels: int, transform: Callable
) -> Stream | None:
    """All images of a named dataset that can only be read in order; None for any other dataset."""
    found = _opened(dataset, root, split, class_map)
    return Stream(found, _mode(channels), transform) if isinstance(found, IterableDataset) else None


def split_folder(root: Path, split: str, names: tuple[str, ...]) -> Path | None:
    """The folder of a split below `root`: the one of its name, or of another usual name for it.

    None where there is none; DataError where the split has a name of its own and no folder.
    """
    if not root.is_dir():
        return None
    if split and (root / split).is_dir():
        return root / split
    if split and split not in names:
        raise DataError(f"{root} has no folder {split!r}; name a split that is there, or leave the option out")
    return next((root / name for name in names if (root / name).is_dir()), None)


def existing(data: str | None) -> Path:
    """`data` as a path to a folder or tar file; DataError if nothing is there."""
    path = Path(data or "")
    if data is None or not path.exists():
        raise DataError(f"{data} is not there; name a folder of images with --data, or a timm dataset with --dataset")
    if path.is_file() and path.suffix != ".tar":
        raise DataError(f"{path} is a file; images come from a folder or a .tar file")
    return path


def _opened(dataset: str, root: str | None, split: str, class_map: Any) -> Any:
    """The result of timm's create_dataset; whatever goes wrong becomes a DataError."""
    return _attempted(
        lambda: create_dataset(dataset, root, split, search_split=False, class_map=class_map or None),  # type: ignore[arg-type]
        dataset or root,
    )


def _attempted(action: Callable[[], Any], name: str | None) -> Any:
    # strangers' readers raise what they like, and print
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return action()
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}".removeprefix("RuntimeError: ")
        way_out = "name a folder that holds images, or check the dataset, its split and its class map"
        raise DataError(f"timm cannot open the images of {name} ({reason}); {way_out}") from error


def _mode(channels: int) -> str:
    if channels not in MODES:
        raise DataError(f"the network takes images of {channels} channels; images can be read with 1 or 3")
    return MODES[channels]


def _numbered(items: Sequence[tuple[Any, int]]) -> dict[str, int] | None:
    """Class indices of a stream that has labels but tells no names."""
    largest = max((int(label) for _, label in items), default=-1)
    return {str(index): index for index in range(largest + 1)} or None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
