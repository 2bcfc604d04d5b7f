"""The parts that a run makes of its images: for weights, for gates, to fit on, and held out to decide by."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.surgery.kept import in_files
from kcrprune.training.images.batches import Batches, in_order
from kcrprune.training.images.checked import require_readable
from kcrprune.training.images.parts import sample, split
from kcrprune.training.images.sets import Images
from kcrprune.training.images.unreadable import Replaced, Replacing
from kcrprune.training.precision import available_device

HELD_OUT = 512  # images, at most, that decide between plans and between weights
OF_IMAGES = 0.25  # of the memory, at most, that images may lie in


@dataclass(frozen=True)
class Parts:
    """The images of a run, divided; whatever a run decides by is in no other part.

    `calibration` and `scoring` are batches (batch, C, H, W) that are kept, the loaders give (images, labels). Of images
    that cannot be read, those that decide are refused here; others take the place of the rest.
    """

    weights: Batches
    gates: Batches
    training: Batches
    calibration: list[Tensor]
    scoring: list[Tensor]
    held_out: DataLoader
    evaluation: DataLoader | None
    replaced: Replaced  # of `calibration`


def divide(images: Images, config: RunConfig) -> Parts:
    """Sets aside what decides; of the rest, gates and weights get a part each. DataError where a part is empty."""
    total = len(images.train)  # type: ignore[arg-type]
    rest = 1 - min(HELD_OUT, total // 5) / max(1, total)
    training, _ = split(images.train, rest, config.seed, "held out")
    plain, held_out = split(images.calibrate, rest, config.seed, "held out")
    require_readable(len(held_out), held_out.__getitem__, config.loaders)  # type: ignore[arg-type]
    weights, gates = split(training, config.search_split, config.seed, "gates")
    gates = training if config.search_split == 1 else gates
    plain = Replacing(plain, config.seed, "calibration")
    calibration = sample(plain, config.calibration_images, config.seed, "calibration")
    scoring = sample(calibration, config.score_images, config.seed, "scoring")
    replaced = Replaced(len(calibration))  # type: ignore[arg-type]
    return Parts(
        weights=_drawn(weights, config, "search: weights"),
        gates=_drawn(gates, config, "search: gates"),
        training=_drawn(training, config, "recover"),
        calibration=_kept(calibration, config, replaced),
        scoring=_kept(scoring, config, replaced),
        held_out=_in_order(held_out, config),
        evaluation=None if images.evaluate is None else _in_order(images.evaluate, config),
        replaced=replaced,
    )


def told_of_few(parts: Parts, config: RunConfig) -> Iterator[str]:
    """What the images did not suffice for, a sentence each."""
    for name, batches in (("calibration_images", parts.calibration), ("score_images", parts.scoring)):
        wanted, found = getattr(config, name), sum(processes.of_all(sum(map(len, batches))))
        if found < wanted:
            yield f"{name}: {wanted:,} are asked for, and there are {found:,}"


def _drawn(dataset: Dataset, config: RunConfig, stage: str) -> Batches:
    size, pinned = _size(dataset, config), _pinned(config)
    return Batches(dataset, size, seed=config.seed, stage=stage, workers=config.loaders, pinned=pinned)


def _in_order(dataset: Dataset, config: RunConfig) -> DataLoader:
    return in_order(dataset, _size(dataset, config), workers=config.loaders, pinned=_pinned(config))


def _pinned(config: RunConfig) -> bool:
    return available_device(config.device) != "cpu"


def _kept(dataset: Dataset, config: RunConfig, replaced: Replaced) -> list[Tensor]:
    """All batches, in memory; in files that have no name any more where they would take much of it."""
    batches, keep = [], None
    for images, _, names in _in_order(dataset, config):
        replaced.note_(names)
        if keep is None:
            few = images.nbytes / len(images) * len(dataset) <= OF_IMAGES * _memory(config)  # type: ignore[arg-type]
            keep = (lambda batch: batch) if few else in_files(Path(tempfile.gettempdir()))
        batches.append(keep(images))
    return batches


def _memory(config: RunConfig) -> float:
    return psutil.virtual_memory().available if config.max_memory is None else config.max_memory * 2**30


def _size(dataset: Dataset, config: RunConfig) -> int:
    size = min(config.batch_size, len(dataset))  # type: ignore[arg-type]
    if size == 0:
        raise DataError("too few images: search, calibration and held-out part each need at least one")
    if size < (count := processes.count()):
        raise DataError(
            f"{count} processes cannot share batches of {size} images: start fewer, or give more images and a larger "
            "--batch-size"
        )
    return size
