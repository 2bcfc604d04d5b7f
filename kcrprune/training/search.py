"""The search: learns gate logits under the budget, and hands them back as scores.

Logits live on the scale of a price: log of (score lost for a MAC saved). Shifting them all by one constant is raising
or lowering that price, and after every step the constant is chosen so that the expected MACs are the budget. So the
budget is met at all times, by construction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.events import Listener
from kcrprune.method.budget import Scores, channel_macs, expected_macs
from kcrprune.method.gates import Gates, temperature_at
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.method.objective import Loss, Objective
from kcrprune.training.features import KernelWatch
from kcrprune.training.randomness import generator
from kcrprune.training.step import Training

LIMIT = 3.0  # largest first logit, in standard deviations: bounds what is never given up, or gone already

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Searched:
    """What a search found: scores for the budget solver, and how it went."""

    scores: Scores
    history: list[dict[str, float]]


def search_(
    model: nn.Module,
    gates: Gates,
    scores: Scores,
    dense_macs: int,
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
    weight_batches: Batches,
    gate_batches: Batches,
    covariance: Covariance,
    *,
    steps: int,
    listener: Listener,
) -> Searched:
    """Learns the gates of a gated model, starting at `scores`; weights move only with a search_weight_lr above 0.

    `covariance` is that of the dense network's features.
    """
    scale = start_logits_(gates, scores, config.search_spread)
    shift_to_budget_(gates, dense_macs, config.target_flops)
    weights = [p for p in model.parameters() if all(p is not logits for logits in gates.parameters())]
    for weight in weights:
        weight.requires_grad_(config.search_weight_lr > 0)

    def sampled_loss(what: str, images: Tensor, labels: Tensor) -> Loss:
        """Under this step's gates: drawn alike for each part of a batch, as a graph serves one backward pass."""
        gates.sample_(temperature, generator(config.seed, "search", step, what))
        return objective(model, images, labels)

    training = partial(
        Training,
        device=accelerator.device,
        seed=config.seed,
        steps=steps,
        clip_grad=config.clip_grad,
        autocast=accelerator.autocast,
        listener=listener,
    )
    adam = torch.optim.Adam(gates.parameters(), lr=config.search_lr)
    adamw = torch.optim.AdamW(weights, lr=config.search_weight_lr, weight_decay=config.weight_decay)
    of_gates = training("search", partial(sampled_loss, "gates"), adam)
    of_weights = training("search: weights", partial(sampled_loss, "gates of a weight step"), adamw)
    watch = KernelWatch(objective, covariance, config.kernel_rank, config.kernel_every)
    for step in range(steps):
        temperature = temperature_at(step, steps, config.temperature, config.temperature_floor)
        figures: dict[str, Tensor | float] = {"temperature": temperature}
        if config.search_weight_lr > 0:
            moved = of_weights.step_(next(weight_batches))
            figures |= {f"weights_{name}": value for name, value in moved.parts.items()}
        loss = of_gates.step_(next(gate_batches))
        shift_to_budget_(gates, dense_macs, config.target_flops)
        figures["expected_macs"] = expected_macs(dense_macs, gates).detach() / dense_macs
        of_gates.tell_(loss.parts | figures | watch.see_(loss.features))
    for weight in weights:
        weight.requires_grad_(True)
    return Searched(learned_scores(gates, scale), of_gates.history)


@torch.no_grad()
def start_logits_(gates: Gates, scores: Scores, spread: float) -> float:
    """Sets the logits to the log of score for a MAC, scaled to a standard deviation of `spread`; returns that scale."""
    prices = []
    for site, axis, _ in gates:
        prices.append(scores[site.name][axis].flatten().log() - torch.tensor(channel_macs(site, axis)).log())
    everything = torch.cat(prices)
    finite = everything[everything.isfinite()]  # what an earlier stage has cut is worth nothing
    middle, deviation = finite.median(), float(finite.std())
    scale = spread / deviation if deviation > 1e-6 else 1.0  # equal scores have none
    for price, (_, _, gate) in zip(prices, gates, strict=True):
        gate.logits.copy_(((price - middle) * scale).clamp(-LIMIT * spread, LIMIT * spread))
    return scale


@torch.no_grad()
def shift_to_budget_(gates: Gates, dense_macs: int, target: float) -> None:
    """Adds one constant to all logits, by bisection, so that the expected MACs are `target` of the dense ones."""
    low, high = -100.0, 100.0
    originals = [gate.logits.clone() for _, _, gate in gates]
    for _ in range(50):
        middle = (low + high) / 2
        for original, (_, _, gate) in zip(originals, gates, strict=True):
            gate.logits.copy_(original + middle)
        if float(expected_macs(dense_macs, gates)) > target * dense_macs:
            high = middle
        else:
            low = middle


@torch.no_grad()
def learned_scores(gates: Gates, scale: float = 1.0) -> Scores:
    """Logits as scores again: exp(logit / scale) for each MAC of the channel."""
    found: dict[str, dict] = {site.name: {} for site in gates.sites}
    for site, axis, gate in gates:
        score = (gate.logits.double() / scale).exp() * channel_macs(site, axis)
        found[site.name][axis] = gates.shaped(site, axis, score).cpu()
    return found


__all__ = ["Searched", "learned_scores", "search_", "shift_to_budget_", "start_logits_"]
