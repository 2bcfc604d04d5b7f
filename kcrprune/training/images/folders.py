"""Folders of images, tar files of them, and where the splits of a data set lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from kcrprune.errors import DataError
from kcrprune.training.images.files import Files, class_of, image_files
from kcrprune.training.images.named import attempted
from kcrprune.training.images.source import Source, mode_of

TRAIN_FOLDERS: Final = ("train", "training")
EVALUATION_FOLDERS: Final = ("validation", "val", "valid", "test", "eval", "evaluation")


@dataclass(frozen=True)
class Labelled(Sequence[tuple[IO[bytes], int]]):
    """Open files with their labels, by index."""

    files: Files
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:  # type: ignore[override]
        return self.files.open(self.files.names[index]), self.labels[index]


def open_folder(root: Path, class_map: str | None, channels: int) -> Source:
    """A folder of class folders, a folder of images without labels, or a tar file of either.

    The first level of folders is the class, and what lies deeper belongs to it.
    """
    files = image_files(root)
    classes = sorted({class_of(name) for name in files.names}, key=lambda name: (natural_key(name), name))
    if "" in classes and len(classes) > 1:
        raise DataError(f"{root} holds images beside its class folders; move them into one, or name a folder below it")
    indices = {name: index for index, name in enumerate(classes)}
    if class_map:
        indices = attempted(lambda: load_class_map(class_map, str(root)), class_map)
        mapped = [name for name in files.names if class_of(name) in indices]
        left = {"in folders that the class map lacks": len(files.names) - len(mapped)}
        files = replace(files, names=mapped, passed_over={**files.passed_over, **{r: n for r, n in left.items() if n}})
    if not files.names:
        raise DataError(f"{files.told or root}: no image is there; name a folder that holds some")
    items = Labelled(files, [indices[class_of(name)] for name in files.names])
    return Source(items, mode_of(channels), None if "" in indices else indices, str(root), files.told)


def open_folders(
    root: Path, splits: tuple[str, str], class_map: str | None, channels: int
) -> tuple[Source, Source | None]:
    """The training images below `root` and, where a folder for it is there, the evaluation images."""
    train, evaluation = split_folder(root, splits[0], TRAIN_FOLDERS), split_folder(root, splits[1], EVALUATION_FOLDERS)
    if train is None and evaluation is not None:
        raise DataError(f"{root} has {evaluation.name!r} but no folder 'train'; add one, or name {evaluation} itself")
    training = open_folder(train or root, class_map, channels)
    return training, open_folder(evaluation, class_map, channels) if evaluation is not None else None


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
    if not path.is_dir() and not (path.is_file() and path.suffix == ".tar"):
        raise DataError(f"{path} is a file; images come from a folder or a .tar file")
    return path
