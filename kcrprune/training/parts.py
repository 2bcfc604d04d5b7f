"""The parts that a run makes of its images: for weights, for gates, to fit on, and held out to decide by."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.training.data import Images, loader, sample, split

HELD_OUT = 512  # images, at most, that decide between plans and between weights


@dataclass(frozen=True)
class Parts:
    """The images of a run, divided; whatever a run decides by is in no other part.

    `calibration` and `scoring` are batches (batch, C, H, W) in memory, the loaders give (images, labels).
    """

    weights: DataLoader
    gates: DataLoader
    training: DataLoader
    calibration: list[Tensor]
    scoring: list[Tensor]
    held_out: DataLoader
    evaluation: DataLoader | None


def divide(images: Images, config: RunConfig) -> Parts:
    """Sets aside what decides; of the rest, gates and weights get a part each. DataError where a part is empty."""
    total = len(images.train)  # type: ignore[arg-type]
    rest = 1 - min(HELD_OUT, total // 5) / max(1, total)
    training, _ = split(images.train, rest, config.seed)
    plain, held_out = split(images.calibrate, rest, config.seed)
    weights, gates = split(training, config.search_split, config.seed)
    calibration = sample(plain, config.calibration_images, config.seed)
    scoring = sample(calibration, config.score_images, config.seed)
    return Parts(
        weights=_loader(weights, config, shuffle=True),
        gates=_loader(gates, config, shuffle=True),
        training=_loader(training, config, shuffle=True),
        calibration=[batch for batch, _ in _loader(calibration, config, shuffle=False)],
        scoring=[batch for batch, _ in _loader(scoring, config, shuffle=False)],
        held_out=_loader(held_out, config, shuffle=False),
        evaluation=None if images.evaluate is None else _loader(images.evaluate, config, shuffle=False),
    )


def told_of_few(parts: Parts, config: RunConfig) -> Iterator[str]:
    """What the images did not suffice for, a sentence each."""
    for name, batches in (("calibration_images", parts.calibration), ("score_images", parts.scoring)):
        wanted, found = getattr(config, name), sum(map(len, batches))
        if found < wanted:
            yield f"{name}: {wanted:,} are asked for, and there are {found:,}"


def _loader(dataset: Dataset, config: RunConfig, *, shuffle: bool) -> DataLoader:
    size = min(config.batch_size, len(dataset))  # type: ignore[arg-type]
    if size == 0:
        raise DataError("too few images: search, calibration and held-out part each need at least one")
    return loader(dataset, size, shuffle=shuffle, seed=config.seed, workers=config.workers, drop_last=shuffle)
