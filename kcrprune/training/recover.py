"""Recovery: trains the pruned model with its structure fixed, and keeps it where it got better."""

import copy
from collections.abc import Iterator
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
from kcrprune.training.step import Training

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


def recover_(
    model: nn.Module,
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
    batches: Iterator[tuple[Tensor, Tensor]],
    held_out: DataLoader,
    covariance: Covariance,
    *,
    steps: int,
    listener: Listener,
) -> Recovered:
    """Trains `model` for `steps` steps; it ends with the weights that did best on `held_out`, its first ones included.

    Without `config.keep_best` it ends with the last weights. A training that diverges is stopped, and ends with the
    best of those before.

    AdamW, linear warm-up, then cosine to zero. A network that a refit has brought near the dense one loses by a rate
    of 5e-5 and more, hence the small default and the look back.
    """
    device = accelerator.device
    optimizer = torch.optim.AdamW(_decayed(model, config.weight_decay), lr=config.lr)
    training = Training(
        "recover",
        partial(objective, model),
        optimizer,
        device,
        config.seed,
        steps,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup_steps)),
        config.clip_grad,
        accelerator.autocast,
        listener,
    )
    watch = KernelWatch(objective, covariance, config.kernel_rank, config.kernel_every)
    measure = HeldOut(objective, held_out, device)
    best, best_step = measure.loss(model), 0
    before, kept, stopped = best, copy.deepcopy(model.state_dict()), None
    model.train()
    try:
        for step in range(1, steps + 1):
            loss = training.step_(next(batches))
            checked = step % max(1, steps // CHECKS) == 0 or step == steps
            figures = {"held_out": measure.loss(model)} if checked else {}
            training.tell_(loss.parts | watch.see_(loss.features) | figures)
            if figures.get("held_out", inf) < best or (step == steps and not config.keep_best):
                best, best_step, kept = figures["held_out"], step, copy.deepcopy(model.state_dict())
    except DivergedError as error:
        stopped = str(error)
    model.load_state_dict(kept)
    model.eval()
    return Recovered(before, best, best_step, training.history, stopped)


def _rate(step: int, steps: int, warmup: int) -> float:
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))


def _decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases, norms, tokens and tables do not, as in timm."""
    exempt = getattr(model, "no_weight_decay", set)()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in exempt and "table" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
