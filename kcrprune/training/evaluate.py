"""How well a network does on images: against their labels, and against another network of classes or of features."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune import processes
from kcrprune.errors import DataError
from kcrprune.events import Listener, StageEnded, StageStarted, StepDone, ignore
from kcrprune.method.objective import UNLABELLED
from kcrprune.plan import Outputs
from kcrprune.training.embeddings import NearnessTotals
from kcrprune.training.portions import Portions

NOT_FINITE = "the network answers what are no finite numbers: its weights or the images hold nan or infinite values"
STAGE = "evaluate"

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Shares between 0 and 1 over `images` images; None is what the data cannot tell."""

    images: int
    top1: float | None = None  # of the labelled images
    top5: float | None = None  # likewise; None where there are no more than five classes
    loss: float | None = None  # mean cross-entropy with the labels, in nats
    agreement: float | None = None  # how often the reference names the same class
    distance: float | None = None  # of the features from the reference's: mean of |y - y0|^2 / |y0|^2
    cosine: float | None = None  # of the two features of an image, the mean
    retrieval: float | None = None  # how often an image's nearest neighbour among the others is the reference's


class Remembered:
    """A network whose logits on one unshuffled set are computed in the first pass and replayed in the next ones."""

    def __init__(self, network: Predict, portions: Portions | None = None) -> None:
        self.network = network
        self.portions = portions
        self.logits: list[Tensor] = []
        self.position = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of the next batch, on the CPU."""
        if self.position == len(self.logits):
            self.logits.append(_logits(self.network, images, self.portions).cpu())
        self.position += 1
        return self.logits[self.position - 1]

    def whole(self) -> list[Tensor]:
        """The logits (images, classes) of each batch, with those of the other processes' images."""
        return processes.rows_of_all(self.logits)

    def rewind_(self) -> Self:
        """Back to the first batch."""
        self.position = 0
        return self


@torch.no_grad()
def evaluate(
    predict: Predict,
    loader: DataLoader,
    *,
    outputs: Outputs = "classes",
    reference: Predict | None = None,
    listener: Listener = ignore,
) -> Evaluation:
    """Runs `predict` over all images; a label below 0 means that an image has none, and of features none is looked at.

    A torch module is put into eval mode for the time of the call, and gets the images on its own device. DataError for
    an empty data set, and for a label that the network has no class for. Several processes share the images.
    """
    start = time.perf_counter()
    listener(StageStarted(STAGE, _length(loader)))
    portions = Portions(STAGE, _device(predict), listener)
    totals = _Totals() if outputs == "classes" else _FeatureTotals()
    with evaluating(predict), evaluating(reference):
        for step, (images, labels) in enumerate(loader, start=1):
            output = _logits(predict, images, portions)
            totals.add_(output, labels, None if reference is None else _logits(reference, images, portions))
            listener(StepDone(STAGE, step))
    totals.sum_over_processes_()
    listener(StageEnded(STAGE, time.perf_counter() - start))
    if totals.images == 0:
        raise DataError("there is no image to evaluate on; name a folder that holds some")
    return totals.result(compared=reference is not None)


@dataclass
class _Totals:
    """Counts and sums over the images so far; what comes of the logits stays on their device until the end."""

    images: int = 0
    labelled: int = 0
    classes: int = 0
    first: Tensor | int = 0
    among_five: Tensor | int = 0
    agreeing: Tensor | int = 0
    loss: Tensor | float = 0.0

    def add_(self, logits: Tensor, labels: Tensor, others: Tensor | None) -> None:
        self.images += len(labels)
        self.labelled += int((labels >= 0).sum())
        self.classes = logits.shape[1]
        if len(labels) and int(labels.max()) >= self.classes:
            raise DataError(
                f"label {int(labels.max())} of an image is none of the network's {self.classes} classes (0 to "
                f"{self.classes - 1}); name the right data, or map its classes with --class-map"
            )
        known = labels.clamp_min(UNLABELLED).to(logits.device, non_blocking=True)
        ranked = logits.topk(min(5, self.classes)).indices == known[:, None]  # (batch, 5)
        self.first += ranked[:, 0].sum()
        self.among_five += ranked.sum()
        self.loss += F.cross_entropy(logits, known, ignore_index=UNLABELLED, reduction="sum").double()
        self.loss += (0 * logits).sum()  # no finite number where one of them is none, labelled or not
        if others is not None:
            self.agreeing += _same(logits, others)

    def sum_over_processes_(self) -> None:
        if processes.count() == 1:
            return
        additive = ("images", "labelled", "first", "among_five", "agreeing", "loss")
        mine = torch.tensor([float(getattr(self, name)) for name in additive], dtype=torch.float64)
        for name, total in zip(additive, processes.summed(mine).tolist(), strict=True):
            setattr(self, name, total if name == "loss" else int(total))

    def result(self, *, compared: bool) -> Evaluation:
        loss = float(self.loss)
        if not isfinite(loss):
            raise DataError(NOT_FINITE)
        agreement = int(self.agreeing) / self.images if compared else None
        if self.labelled == 0:
            return Evaluation(self.images, agreement=agreement)
        return Evaluation(
            images=self.images,
            top1=int(self.first) / self.labelled,
            top5=int(self.among_five) / self.labelled if self.classes > 5 else None,
            loss=loss / self.labelled,
            agreement=agreement,
        )


@dataclass
class _FeatureTotals:
    """Of a network of features, where images are only counted unless there is a reference."""

    images: int = 0
    nearness: NearnessTotals = field(default_factory=NearnessTotals)

    def add_(self, features: Tensor, labels: Tensor, others: Tensor | None) -> None:
        self.images += len(labels)
        if others is not None:
            self.nearness.add_(features, others)

    def sum_over_processes_(self) -> None:
        self.images = sum(processes.of_all(self.images))
        self.nearness.gather_over_processes_()

    def result(self, *, compared: bool) -> Evaluation:
        figures = vars(self.nearness.result()) if compared else {}
        if not all(isfinite(figure) for figure in figures.values() if figure is not None):
            raise DataError(NOT_FINITE)
        return Evaluation(self.images, **figures)


def _logits(predict: Predict, images: Tensor, portions: Portions | None) -> Tensor:
    """(batch, classes), or features (batch, ...), in float32, where the network is; of a module in `portions`."""
    network: object = predict
    if not isinstance(network, nn.Module):
        return predict(images).float()
    images = images.to(_device(predict), non_blocking=True)
    portions = portions or Portions(STAGE, images.device)
    return portions.of(
        len(images), lambda at_once: torch.cat([predict(part).float() for part in images.split(at_once)])
    )


def _device(predict: Predict) -> torch.device:
    """Where a network is; what is no module of torch is on the CPU."""
    network: object = predict
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next(parameters, torch.empty(0)).device


def _same(logits: Tensor, others: Tensor) -> Tensor:
    """How many images both name the same class of."""
    if logits.shape != others.shape:
        raise DataError(
            f"the network has {logits.shape[1]} classes and the reference {others.shape[1]}; only networks of the same "
            "classes can be compared"
        )
    return (logits.argmax(dim=1) == others.to(logits.device).argmax(dim=1)).sum()


@contextmanager
def evaluating(network: object) -> Iterator[None]:
    """Eval mode, and afterwards the mode that was before."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _length(loader: DataLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream does not know its length
        return None
