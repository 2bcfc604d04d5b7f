"""Recovery: trains the pruned model with its structure fixed, and keeps it where it got better."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kcrprune.config import RunConfig
from kcrprune.events import Listener, StepDone
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.method.objective import Objective
from kcrprune.training.loop import HeldOut, KernelWatch

CHECKS = 4  # how often the held-out loss is looked at


@dataclass(frozen=True)
class Recovered:
    """Held-out task loss before and after, the step whose weights were kept (0: the first ones), the course."""

    loss_before: float
    loss_after: float
    kept_step: int
    history: list[dict[str, float]]


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

    Without `config.keep_best` it ends with the last weights.

    AdamW, linear warm-up, then cosine to zero. A network that a refit has brought near the dense one loses by a rate
    of 5e-5 and more, hence the small default and the look back.
    """
    device = accelerator.device
    optimizer = torch.optim.AdamW(_decayed(model, config.weight_decay), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup_steps))
    watch = KernelWatch(objective, covariance, config.kernel_rank, config.kernel_every)
    measure = HeldOut(objective, held_out, device)
    best, best_step = measure.loss(model), 0
    before, kept, history = best, copy.deepcopy(model.state_dict()), []
    for step in range(1, steps + 1):
        model.train()
        images, labels = (tensor.to(device) for tensor in next(batches))
        with accelerator.autocast():
            loss = objective(model, images, labels)
        optimizer.zero_grad()
        accelerator.backward(loss.total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        schedule.step()
        figures = loss.parts | watch.see_(loss.features)
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            figures["held_out"] = measure.loss(model)
            if figures["held_out"] < best or (step == steps and not config.keep_best):
                best, best_step, kept = figures["held_out"], step, copy.deepcopy(model.state_dict())
        history.append({"step": step} | figures)
        listener(StepDone("recover", step, figures))
    model.load_state_dict(kept)
    model.eval()
    return Recovered(before, best, best_step, history)


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
