"""The search: learns gate logits under the budget, and hands them back as scores; it may train the weights as well.

Logits live on the scale of a price: log of (score lost for a MAC saved). Shifting them all by one constant is raising
or lowering that price, and after every step the constant is chosen so that the expected MACs are the budget. So the
budget is met at all times, by construction.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.events import Listener
from kcrprune.method.budget import Scores
from kcrprune.method.cost import MacCost
from kcrprune.method.gates import Gates, temperature_at
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.method.objective import Loss, Objective
from kcrprune.method.shift import ExpectedMacs
from kcrprune.training.features import KernelWatch
from kcrprune.training.pace import Pace
from kcrprune.training.randomness import generator
from kcrprune.training.scores import prices
from kcrprune.training.snapshots import NO_SNAPSHOTS, Snapshots, State
from kcrprune.training.step import Training, decayed

LIMIT = 3.0  # largest first logit, in standard deviations: bounds what is never given up, or gone already

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Searched:
    """What a search found: scores for the budget solver, and how it went."""

    scores: Scores
    history: list[dict[str, float]]


@dataclass
class _Sampled:
    """The loss of a batch under the gates of a step."""

    model: nn.Module
    gates: Gates
    objective: Objective
    config: RunConfig
    pace: Pace
    step: int = 0

    @property
    def temperature(self) -> float:
        """It falls from step to step."""
        return temperature_at(self.pace.at, self.pace.steps, self.config.temperature, self.config.temperature_floor)

    def loss(self, what: str, images: Tensor, labels: Tensor) -> Loss:
        """Gates are drawn alike for each part of a batch, as a graph serves one backward pass."""
        draw = generator(self.config.seed, "search", self.step, what)
        self.gates.sample_(self.temperature, torch.rand(self.gates.logits.shape, generator=draw))
        return self.objective(self.model, images, labels)


def search_(
    model: nn.Module,
    gates: Gates,
    scores: Scores,
    cost: MacCost,
    objective: Objective,
    config: RunConfig,
    accelerator: Accelerator,
    weight_batches: Batches,
    gate_batches: Batches,
    covariance: Covariance,
    *,
    pace: Pace,
    listener: Listener,
    snapshots: Snapshots = NO_SNAPSHOTS,
    at_once: int | None = None,
) -> Searched:
    """Learns the gates of a gated model, starting at `scores`; weights move only with a search_weight_lr above 0.

    Then both learn from the same batch, in one backward pass, or in turns where `search_split` gives each its images.
    Both kinds of batches are given from a step on, and taken `at_once` images at a time. `covariance` is that of the
    dense network's features.
    """
    scale = start_logits_(gates, scores, cost, config.search_spread)
    expected, budget = ExpectedMacs(cost, gates), config.target_flops * cost.dense
    expected.shift_(gates.logits.data, budget)
    weights = _learned(model, trained=config.search_weight_lr > 0)
    sampled = _Sampled(model, gates, objective, config, pace)
    training = partial(
        Training,
        device=accelerator.device,
        seed=config.seed,
        pace=pace,
        clip_grad=config.clip_grad,
        autocast=accelerator.autocast,
        listener=listener,
        at_once=at_once,
    )
    in_turn = _in_turn(training, sampled, weights, config)
    of_gates = training("search", partial(sampled.loss, "gates"), _optimizer(model, gates, config), beside=in_turn)
    watch = KernelWatch(objective, covariance, config.kernel_rank, config.kernel_every)
    learned, parts = [gates.logits, *weights.values()], {**in_turn, "gates": of_gates, "watch": watch}
    _restore_(learned, parts, snapshots.newest())  # gates last: they set the pace
    drawn_weights, drawn_gates = weight_batches(of_gates.done), gate_batches(of_gates.done)
    while not pace.ended:
        sampled.step = of_gates.done
        figures: dict[str, Tensor | float] = {"temperature": sampled.temperature}
        for prefix, of_weights in in_turn.items():
            moved = of_weights.step_(next(drawn_weights))
            figures |= {f"{prefix}{name}": value for name, value in moved.parts.items()}
        before = gates.logits.detach().clone()
        loss = of_gates.step_(next(drawn_gates))
        expected.follow_(gates.logits.data, before, budget)
        figures["expected_macs"] = expected(gates.logits.detach())[0] / cost.dense
        of_gates.tell_(loss.parts | figures | watch.see_(loss.features))
        if of_gates.all_told:
            snapshots.offer(partial(_state, learned, parts))
    model.requires_grad_(True)
    return Searched(learned_scores(gates, cost, scale), of_gates.history)


def _learned(model: nn.Module, *, trained: bool) -> dict[str, nn.Parameter]:
    """The weights that a search may train, by name; they get gradients where it does."""
    frozen = getattr(model, "frozen", ())
    found = {name: weight for name, weight in model.named_parameters() if name not in frozen}
    for weight in found.values():
        weight.requires_grad_(trained)
    return found


def _in_turn(
    training: Callable[..., Training], sampled: _Sampled, weights: dict[str, nn.Parameter], config: RunConfig
) -> dict[str, Training]:
    """What is trained between two steps of the gates, by the prefix of its figures: the weights, or nothing."""
    if config.search_weight_lr == 0 or config.searches_jointly:
        return {}
    adamw = torch.optim.AdamW([*weights.items()], lr=config.search_weight_lr, weight_decay=config.weight_decay)
    return {"weights_": training("search: weights", partial(sampled.loss, "gates of a weight step"), adamw)}


def _optimizer(model: nn.Module, gates: Gates, config: RunConfig) -> torch.optim.Optimizer:
    """Adam of the gates; where a step trains both, AdamW of the weights beside it, as in a recovery."""
    if not config.searches_jointly:
        return torch.optim.Adam([("gates", gates.logits)], lr=config.search_lr)
    of_gates = {"params": [("gates", gates.logits)], "lr": config.search_lr, "weight_decay": 0.0}
    return torch.optim.AdamW([*decayed(model, config.weight_decay), of_gates], lr=config.search_weight_lr)


def _state(learned: Sequence[Tensor], parts: Mapping[str, Training | KernelWatch]) -> State:
    return {"learned": [tensor.detach() for tensor in learned], **{name: part.state() for name, part in parts.items()}}


@torch.no_grad()
def _restore_(learned: Sequence[Tensor], parts: Mapping[str, Training | KernelWatch], state: State | None) -> None:
    if state is None:
        return
    for tensor, value in zip(learned, state["learned"], strict=True):
        tensor.copy_(value)
    for name, part in parts.items():
        part.load_(state[name])


@torch.no_grad()
def start_logits_(gates: Gates, scores: Scores, cost: MacCost, spread: float) -> float:
    """Sets the logits to the log of score for a MAC, scaled to a standard deviation of `spread`; returns that scale."""
    price = gates.flat(scores).log() - prices(gates, cost).log()
    finite = price[price.isfinite()]  # what an earlier stage has cut is worth nothing
    middle, deviation = finite.median(), float(finite.std())
    scale = spread / deviation if deviation > 1e-6 else 1.0  # equal scores have none
    gates.logits.copy_(((price - middle) * scale).clamp(-LIMIT * spread, LIMIT * spread))
    return scale


@torch.no_grad()
def learned_scores(gates: Gates, cost: MacCost, scale: float = 1.0) -> Scores:
    """Logits as scores again: exp(logit / scale) for each MAC of the channel."""
    flat = (gates.logits.double() / scale).exp() * prices(gates, cost).double()
    return gates.by_group(flat.cpu())
