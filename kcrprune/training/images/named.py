"""Data sets that timm opens, with whatever goes wrong in strangers' readers told in one sentence."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch.utils.data import IterableDataset

from kcrprune.errors import DataError
from kcrprune.training.images.decode import first_line, in_mode
from kcrprune.training.images.source import Source, mode_of


class Stream(IterableDataset):
    """Images that come in order, of unknown number, as tensors."""

    def __init__(self, items: Iterable[tuple[Image.Image, int]], mode: str, transform: Callable) -> None:
        self.items, self.mode, self.transform = items, mode, transform

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for index, (image, label) in enumerate(self.items):
            yield self.transform(in_mode(image, self.mode, f"image {index} of the stream")), int(label)


def open_named(
    dataset: str, root: str | None, split: str, class_map: str | None, channels: int, *, keep: int
) -> Source:
    """One of timm's named datasets (torch/, hfds/, wds/, ...); of a stream the first `keep` images, held in memory."""
    found = opened(dataset, root, split, class_map)
    place = f"{dataset} ({split})"
    indices = getattr(found, "class_to_idx", None) or getattr(getattr(found, "reader", None), "class_to_idx", None)
    if isinstance(found, IterableDataset):
        items = attempted(lambda: list(islice(found, keep)), dataset)
        source = Source(items, mode_of(channels), indices or _numbered(items), place)
    else:
        source = Source(getattr(found, "reader", found), mode_of(channels), indices, place)
    if len(source) == 0:
        raise DataError(f"{place} holds no images; name a dataset and a split that do")
    return source


def open_stream(
    dataset: str, root: str | None, split: str, class_map: str | None, channels: int, transform: Callable
) -> Stream | None:
    """All images of a named dataset that can only be read in order; None for any other dataset."""
    found = opened(dataset, root, split, class_map)
    return Stream(found, mode_of(channels), transform) if isinstance(found, IterableDataset) else None


def opened(dataset: str, root: str | None, split: str, class_map: Any) -> Any:
    """The result of timm's create_dataset; whatever goes wrong becomes a DataError."""
    return attempted(
        lambda: create_dataset(dataset, root, split, search_split=False, class_map=class_map or None),  # type: ignore[arg-type]
        dataset or root,
    )


def attempted(action: Callable[[], Any], name: str | None) -> Any:
    """What a stranger's reader returns; it may raise what it likes, which becomes a DataError, and print."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return action()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}".removeprefix("RuntimeError: ")
        way_out = "name a folder that holds images, or check the dataset, its split and its class map"
        raise DataError(f"timm cannot open the images of {name} ({reason}); {way_out}") from error


def _numbered(items: Sequence[tuple[Any, int]]) -> dict[str, int] | None:
    """Class indices of a stream that has labels but tells no names."""
    largest = max((int(label) for _, label in items), default=-1)
    return {str(index): index for index in range(largest + 1)} or None
