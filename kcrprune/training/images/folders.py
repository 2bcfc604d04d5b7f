"""Folders of images, tar files of them, and where the splits of a data set lie."""

from pathlib import Path
from typing import Final

from kcrprune.errors import DataError
from kcrprune.training.images.named import opened
from kcrprune.training.images.source import Source, mode_of

TRAIN_FOLDERS: Final = ("train", "training")
EVALUATION_FOLDERS: Final = ("validation", "val", "valid", "test", "eval", "evaluation")


def open_folder(root: Path, class_map: str | None, channels: int) -> Source:
    """A folder of class folders, a folder of images without labels, or a tar file of either."""
    items = opened("", str(root), "", class_map).reader
    indices = dict(items.class_name_to_idx if root.is_file() else items.class_to_idx)
    flat = indices.keys() & {"", "."}  # what timm calls the class of images that lie in no folder
    if flat and len(indices) > 1:
        raise DataError(f"{root} holds images beside its class folders; move them into one, or name a folder below it")
    source = Source(items, mode_of(channels), None if flat else indices, str(root))
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
        items = opened("", str(evaluation), "", dict(training.class_indices)).reader
        held_out = Source(items, held_out.mode, training.class_indices, held_out.place)
    return training, held_out


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
