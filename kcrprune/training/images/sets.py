"""The images of a run: its training, calibration and evaluation set."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms

from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.plan import Preprocessing
from kcrprune.training.images.checked import require_readable
from kcrprune.training.images.folders import (
    EVALUATION_FOLDERS,
    TRAIN_FOLDERS,
    existing,
    open_folder,
    open_folders,
    split_folder,
)
from kcrprune.training.images.generated import GeneratedImages
from kcrprune.training.images.named import open_named, open_stream
from kcrprune.training.images.parts import split
from kcrprune.training.images.source import Source
from kcrprune.training.images.transforms import Transform, evaluation_transform, training_transform

HELD_OUT: Final = 0.1  # share of the training images that is evaluated on where there is no evaluation set
GENERATED_HELD_OUT: Final = 1 / 8  # further generated images, to evaluate on, as a share of those trained on
STREAMED: Final = 4096  # images of a stream (WebDataset and the like) that a run trains on; they are kept in memory


@dataclass(frozen=True)
class Images:
    """What a run works on; items are (image (C, H, W), label), and the label is -1 where there is none.

    `train` is augmented, `calibrate` holds the same images in the same order as the network sees them when it is used.
    """

    train: Dataset
    calibrate: Dataset
    evaluate: Dataset | None
    labelled: bool
    generated: bool
    class_names: tuple[str, ...] | None
    description: str
    notes: tuple[str, ...] = ()  # what a user should know of them, a sentence each


def open_images(
    config: RunConfig, preprocessing: Preprocessing, num_classes: int, class_names: tuple[str, ...] | None = None
) -> Images:
    """The images that a configuration names; DataError, in one sentence, for whatever is wrong with them.

    Without an evaluation set a part of the training images is held out. Labels count only if the network has classes,
    and are matched by name where it has `class_names` and no class map decides; a run that is told to ignore them
    still measures itself by them where they fit.
    """
    if config.data is None and not config.dataset:
        return _generated_images(config, preprocessing)
    training, evaluation = _sources(config, preprocessing.input_size[0])
    for source in (training, evaluation):
        if source is not None and not config.dataset:
            require_readable(len(source), source.probe, config.loaders)
    labelled = config.labels and num_classes > 0 and training.labelled
    names = None if config.class_map else class_names
    if labelled:
        training = training.for_network(num_classes, names)
    augmented, plain = training_transform(preprocessing, config.hflip), evaluation_transform(preprocessing)
    train, calibrate = Pictures(training, augmented, labelled=labelled), Pictures(training, plain, labelled=labelled)
    names = names or (training.class_names if training.fits(num_classes) else None)
    measured, known = _known(evaluation or training, num_classes, names, required=labelled)
    held_out: Dataset = Pictures(measured, plain, labelled=known)
    told = f"{_length(held_out):,} to evaluate on"
    if evaluation is None:
        share = 1 - HELD_OUT if len(training) > 1 else 1.0
        train, _ = split(train, share, config.seed, "evaluation")
        calibrate, _ = split(calibrate, share, config.seed, "evaluation")
        _, held_out = split(held_out, share, config.seed, "evaluation")
        told = f"{_length(held_out):,} of the training set held out to evaluate on"
    return Images(
        train=train,
        calibrate=calibrate,
        evaluate=held_out if _length(held_out) else None,
        labelled=labelled,
        generated=False,
        class_names=training.class_names if labelled else None,
        description=f"{_length(train):,} {'labelled' if labelled else 'unlabelled'} images, {told}",
        notes=tuple(_notes(training, evaluation, labelled=labelled)),
    )


def _known(source: Source, num_classes: int, names: tuple[str, ...] | None, *, required: bool) -> tuple[Source, bool]:
    """A source to measure on, and whether its labels say how good a network is; DataError if they must and do not."""
    if not source.labelled:
        return source, False
    try:
        return source.for_network(num_classes, names, some=True), True
    except DataError:
        if required:
            raise
        return source, False


def _notes(training: Source, evaluation: Source | None, *, labelled: bool) -> Iterator[str]:
    yield from (source.told for source in (training, evaluation) if source is not None and source.told)
    if labelled and evaluation is not None and not evaluation.labelled:
        yield f"top-1 cannot be measured: the images of {evaluation.place} have no labels, which are folders of classes"


def open_evaluation(
    data: str | None,
    preprocessing: Preprocessing,
    num_classes: int | None,
    *,
    dataset: str = "",
    split: str = "validation",
    class_map: str | None = None,
    class_names: tuple[str, ...] | None = None,
    workers: int = 0,
) -> Dataset:
    """The images of one split, or of a plain folder of class folders; `num_classes` None takes any classes.

    DataError where they have no labels, or none that fit; some of the `class_names` of a network suffice.
    """
    channels, transform = preprocessing.input_size[0], evaluation_transform(preprocessing)
    if dataset:
        stream = open_stream(dataset, data, split, class_map, channels, transform)
        if stream is not None:
            return stream
        source = open_named(dataset, data, split, class_map, channels, keep=0)
    else:
        root = existing(data)
        folder = split_folder(root, split, EVALUATION_FOLDERS)
        if folder is None and split_folder(root, "", TRAIN_FOLDERS):
            raise DataError(f"{root} has training images and no folder 'validation'; name the folder to evaluate on")
        source = open_folder(folder or root, class_map, channels)
    if not source.labelled:
        raise DataError(f"the images of {source.place} have no labels to evaluate by; give each class a folder")
    if num_classes is not None:
        source = source.for_network(num_classes, None if class_map else class_names, some=True)
    if not dataset:
        require_readable(len(source), source.probe, workers)
    return Pictures(source, transform, labelled=True)


class Pictures(Dataset):
    """The images of a source as tensors; labels are -1 where they are not used."""

    def __init__(self, source: Source, transform: Transform, *, labelled: bool) -> None:
        self.source, self.transform, self.labelled = source, transform, labelled

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source.read(index)
        return self.transform(image), label if self.labelled else -1


class _Generated(Dataset):
    """Generated images as the network takes them."""

    def __init__(self, images: GeneratedImages, preprocessing: Preprocessing) -> None:
        self.images = images
        self.channels = preprocessing.input_size[0]
        self.normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]  # (3, H, W)
        return self.normalise(image if self.channels == 3 else image.mean(0, keepdim=True)), -1


def _generated_images(config: RunConfig, preprocessing: Preprocessing) -> Images:
    """As many generated images as the configuration asks for, and some further ones to measure agreement on."""
    count, (channels, *size) = config.generated_images, preprocessing.input_size
    if channels not in (1, 3):
        raise DataError(f"images of {channels} channels cannot be generated; name a dataset")
    held_out = max(1, round(count * GENERATED_HELD_OUT))
    images = GeneratedImages(count + held_out, (size[0], size[1]), config.seed, Path(tempfile.gettempdir()))
    everything = _Generated(images, preprocessing)
    training = Subset(everything, range(count))
    return Images(
        train=training,
        calibrate=training,
        evaluate=Subset(everything, range(count, len(everything))),
        labelled=False,
        generated=True,
        class_names=None,
        description=f"{count:,} generated images, {held_out:,} further ones to measure agreement on",
    )


def _sources(config: RunConfig, channels: int) -> tuple[Source, Source | None]:
    """Training images and, where there are some, evaluation images."""
    if not config.dataset:
        root = existing(config.data)
        return open_folders(root, (config.train_split, config.val_split), config.class_map, channels)

    def named(split_name: str) -> Source:
        return open_named(config.dataset, config.data, split_name, config.class_map, channels, keep=STREAMED)

    return named(config.train_split), named(config.val_split) if config.val_split else None


def _length(dataset: Dataset) -> int:
    return len(dataset)  # type: ignore[arg-type]
