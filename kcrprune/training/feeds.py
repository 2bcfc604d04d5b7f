"""Batches that a user's loader gives: read once, kept, divided, and dealt out again by address."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.families import Feed, Given
from kcrprune.families.given import Use, asked, tensors_in
from kcrprune.method.objective import UNLABELLED, Objective
from kcrprune.plan import canonical_json
from kcrprune.training.images.unreadable import Replaced
from kcrprune.training.parts import HELD_OUT, Parts
from kcrprune.training.randomness import generator

KEPT: Final = 4096  # images, at most, that are read from a loader and kept in memory
REMEMBERED: Final = 2**30  # bytes of outputs that the dense network may leave for the images that decide


def read_feeds(loader: Iterable[Any], use: Use, config: RunConfig) -> tuple[Feed, ...]:
    """The first batches of a loader, as many as a run takes; DataError where it gives none."""
    trained = max(config.recover_steps, config.search_steps) * config.batch_size if config.epochs is None else KEPT
    wanted = min(KEPT, HELD_OUT + max(config.calibration_images, config.score_images, trained))
    feeds, images = [], 0
    for batch in loader:
        feeds.append(Feed.of(batch, use))
        images += len(feeds[-1])
        if images >= wanted:
            break
    if images == 0:
        raise DataError(f"the loader ({type(loader).__name__}) gives no images; a loader can be iterated over again")
    return tuple(feed for feed in feeds if len(feed))


def fingerprint(feeds: Sequence[Feed]) -> str:
    """The sha256 of everything in some batches that is a tensor, and of their shapes."""
    total = sha256()
    for feed in feeds:
        total.update(canonical_json(feed.shapes).encode())
        for name, tensor in tensors_in(feed.batch):
            total.update(canonical_json([name, str(tensor.dtype)]).encode())
            total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class FeedBatches:
    """(batch, no labels) of one stage: which batch is the `step`-th follows from (seed, stage, step) alone."""

    def __init__(self, feeds: Sequence[Feed], *, seed: int, stage: str) -> None:
        self.feeds, self.seed, self.stage = feeds, seed, stage
        self.replaced, self.waited = Replaced(sum(map(len, feeds))), 0.0  # all are in memory

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.feeds)

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Endless batches from this step on."""
        first, done = divmod(step, len(self))
        for epoch in count(first):
            order = torch.randperm(len(self), generator=generator(self.seed, self.stage, epoch, "order"))
            yield from map(unlabelled, (self.feeds[index] for index in order.tolist()[done:]))
            done = 0


def unlabelled(feed: Feed) -> tuple[Any, Tensor]:
    """A batch as trainings take it; what it is to be like, a user's loss finds in the batch itself."""
    return feed, torch.full((len(feed),), UNLABELLED)


def divide_feeds(feeds: Sequence[Feed], config: RunConfig, output_bytes: float) -> Parts:
    """Sets batches aside that decide, a fifth of the images at most; a single batch serves for everything.

    `output_bytes` is what the outputs of an image take, which the dense network leaves for those.
    """
    order = torch.randperm(len(feeds), generator=generator(config.seed, "images", 0, "held out")).tolist()
    drawn = [feeds[index] for index in order]
    total = sum(map(len, feeds))
    held_out = _first(drawn, min(HELD_OUT, total // 5, max(1, int(REMEMBERED / max(1.0, output_bytes)))))
    rest = drawn[len(held_out) :] or drawn
    jointly = config.search_split == 1
    weights = rest if jointly else rest[: max(1, min(round(config.search_split * len(rest)), len(rest) - 1))]
    gates = rest if jointly else rest[len(weights) :] or rest
    calibration: Any = _first(rest, config.calibration_images)

    def batches(of: Sequence[Feed], stage: str) -> Any:
        return FeedBatches(of, seed=config.seed, stage=stage)

    deciding: Any = [unlabelled(feed) for feed in held_out]
    return Parts(
        weights=batches(weights, "search: weights"),
        gates=batches(gates, "search: gates"),
        training=batches(rest, "recover"),
        calibration=calibration,
        scoring=_first(calibration, config.score_images),
        held_out=deciding,
        evaluation=None,
        replaced=Replaced(total),
    )


def _first(feeds: Sequence[Any], images: int) -> list[Any]:
    """As many of the first batches as hold that many images, one at least."""
    found: list[Any] = []
    for feed in feeds:
        if found and sum(map(len, found)) + len(feed) > images:
            break
        found.append(feed)
    return found


@dataclass
class UsersObjective(Objective):
    """The distance to the dense network's outputs, and the user's own loss of what the network returns.

    `in_eval`: the loss can be taken outside training as well, where batches decide between weights.
    """

    in_eval: bool = True

    def _task(self, model: nn.Module, output: Tensor, images: Any, labels: Tensor) -> dict[str, Tensor]:
        assert isinstance(model, Given)
        returned, model.returned = model.returned, None
        parts = super()._task(model, output, images, labels)
        if model.use.loss is not None and (model.inside.training or self.in_eval):
            parts["loss of the task"] = users_loss(model.use, returned, images.batch)
        return parts


def users_loss(use: Use, returned: Any, batch: Any) -> Tensor:
    """The loss that a user takes; DataError where it is no number that gradients can be taken of."""
    assert use.loss is not None
    found = asked("loss", use.loss, returned, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise DataError(f"loss gives {type(found).__name__}; it has to give one number as a tensor")
    return found.float().reshape(())
