"""Recovery: trains the pruned model with its structure fixed, and keeps it where it got better."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import cos, inf, pi

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune.config import RunConfig
from kcrprune.errors import DivergedError
from kcrprune.events import Listener
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.method.objective import Objective
from kcrprune.training.features import KernelWatch
from kcrprune.training.losses import HeldOut
from kcrprune.training.pace import Pace
from kcrprune.training.snapshots import NO_SNAPSHOTS, Snapshots, State
from kcrprune.training.step import Training, decayed, train_

CHECKS = 4  # how often the held-out loss is looked at


@dataclass(frozen=True)
class Recovered:
    """Held-out task loss before and after, the step whose weights were kept (0: the first ones), the course.

    `stopped` says why it ended before its last step, if it did.
    """

    loss_before: float
    loss_after: float
    kept_step: int
    history: list[dict[str, float]]
    stopped: str | None = None


@dataclass
class _Best:
    """The weights with the lowest held-out loss so far, the step that they are of, and the first loss."""

    before: float
    loss: float
    step: int
    weights: dict[str, Tensor]


def recover_(
    model: nn.Module,
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    held_out: DataLoader,
    covariance: Covariance,
    *,
    pace: Pace,
    listener: Listener,
    snapshots: Snapshots = NO_SNAPSHOTS,
    at_once: int | None = None,
) -> Recovered:
    """Trains `model` at a pace; it ends with the weights that did best on `held_out`, its first ones included.

    `batches` gives those from a step on, which are taken `at_once` images at a time. Without `config.keep_best` it ends
    with the last weights. A training that diverges is stopped, and ends with the best of those before.

    AdamW, linear warm-up, then cosine to zero. A network that a refit has brought near the dense one loses by a rate
    of 5e-5 and more, hence the small default and the look back.
    """
    training = _training(model, objective, config, accelerator, pace, listener, at_once)
    watch = KernelWatch(objective, covariance, config.kernel_rank, config.kernel_every)
    measure, stopped = HeldOut(objective, held_out, accelerator.device, listener), None
    if (state := snapshots.newest()) is not None:
        model.load_state_dict(state["weights"])
        training.load_(state["training"])
        watch.load_(state["watch"])
        best = _Best(**state["best"])
    else:
        loss = measure.loss(model)
        best = _Best(loss, loss, 0, copy.deepcopy(model.state_dict()))
    drawn = batches(training.done)
    train_(model)
    try:
        while not pace.ended:
            loss = training.step_(next(drawn))
            step = training.done
            checked = step % max(1, pace.steps // CHECKS) == 0 or pace.ended
            figures = {"held_out": measure.loss(model)} if checked else {}
            training.tell_(loss.parts | watch.see_(loss.features) | figures)
            if figures.get("held_out", inf) < best.loss or (pace.ended and not config.keep_best):
                best = _Best(best.before, figures["held_out"], step, copy.deepcopy(model.state_dict()))
            if training.all_told:
                snapshots.offer(partial(_state, model, training, watch, best))
    except DivergedError as error:
        stopped = str(error)
    model.load_state_dict(best.weights)
    model.eval()
    return Recovered(best.before, best.loss, best.step, training.history, stopped)


def _training(
    model: nn.Module,
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
    pace: Pace,
    listener: Listener,
    at_once: int | None,
) -> Training:
    optimizer = torch.optim.AdamW(decayed(model, config.weight_decay), lr=config.lr)
    return Training(
        "recover",
        partial(objective, model),
        optimizer,
        accelerator.device,
        config.seed,
        pace,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: _rate(pace.at, pace.steps, config.warmup_steps)),
        config.clip_grad,
        accelerator.autocast,
        listener,
        at_once,
    )


def _state(model: nn.Module, training: Training, watch: KernelWatch, best: _Best) -> State:
    return {"weights": model.state_dict(), "training": training.state(), "watch": watch.state(), "best": vars(best)}


def _rate(step: float, steps: int, warmup: int) -> float:
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))
