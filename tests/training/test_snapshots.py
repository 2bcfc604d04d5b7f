"""A training that goes on from a snapshot of any of its steps ends, bit by bit, where one that was not stopped does."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kcrprune.config import RunConfig
from kcrprune.events import ignore
from kcrprune.run.snapshots import CODEC
from kcrprune.training.features import feature_covariance
from kcrprune.training.losses import make_objective
from kcrprune.training.pace import Pace
from kcrprune.training.precision import open_accelerator
from kcrprune.training.recover import recover_
from kcrprune.training.scores import equal_scores
from kcrprune.training.search import search_
from tests.tiny import TINY, Tiny, cost_of, gated

STEPS = 5
CONFIG = RunConfig(target_flops=0.9, search_weight_lr=1e-3, lr=1e-3, kernel_every=2, warmup_steps=2)
SOME = [tiny for tiny in TINY if tiny.label in ("vit", "swin", "eva02_scaled")]


@dataclass
class Kept:
    """Every state in the form of a file; `given` is the one that a training begins with."""

    given: Any = None
    states: list[Any] = field(default_factory=list)

    def newest(self) -> Any:
        return None if self.given is None else CODEC.unpack(self.given)

    def offer(self, state: Callable[[], Any]) -> None:
        self.states.append(CODEC.pack(state()))


def from_step(tiny: Tiny) -> Callable[[int], Any]:
    loader = DataLoader(TensorDataset(tiny.images(12), torch.arange(12) % 5), 4)
    return lambda step: islice(cycle(loader), step, None)


def recovered(tiny: Tiny, snapshots: Kept) -> tuple[dict[str, Tensor], Any]:
    dense = tiny.model()
    model = tiny.model(seed=1)
    found = recover_(
        model,
        make_objective(CONFIG, dense, labelled=True),
        CONFIG,
        open_accelerator("cpu", "fp32"),
        from_step(tiny),
        DataLoader(TensorDataset(tiny.images(8, 3), torch.arange(8) % 5), 4),
        feature_covariance(dense, [tiny.images(8)]),
        pace=Pace(STEPS),
        listener=ignore,
        snapshots=snapshots,
    )
    return copy.deepcopy(model.state_dict()), found


def searched(tiny: Tiny, snapshots: Kept) -> tuple[dict[str, Tensor], Any]:
    dense, model = tiny.model(), tiny.model()
    gates, cost = gated(model), cost_of(dense, tiny)
    found = search_(
        model,
        gates,
        equal_scores(gates, cost),
        cost,
        make_objective(CONFIG, dense, labelled=True),
        CONFIG,
        open_accelerator("cpu", "fp32"),
        from_step(tiny),
        from_step(tiny),
        feature_covariance(dense, [tiny.images(8)]),
        pace=Pace(STEPS),
        listener=ignore,
        snapshots=snapshots,
    )
    scores = {str(key): score for key, score in found.scores.items()}
    return copy.deepcopy(model.state_dict()) | scores, found.history


@pytest.mark.parametrize("train", [recovered, searched])
@pytest.mark.parametrize("tiny", SOME, ids=lambda tiny: tiny.label)
def test_a_training_goes_on_from_each_step_as_if_it_had_not_been_stopped(tiny: Tiny, train: Any):
    whole = Kept()
    tensors, told = train(tiny, whole)
    assert len(whole.states) == STEPS
    for step in (1, 3, STEPS):
        rest = Kept(given=whole.states[step - 1])
        again, told_again = train(tiny, rest)
        assert len(rest.states) == STEPS - step, "no step is made twice"
        assert told_again == told
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
