"""The step of a training: what memory, divergence and a stop in between change of it, which is nothing."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kcrprune.errors import ConfigError, DivergedError
from kcrprune.events import Event, Note, StepDone
from kcrprune.method.objective import Loss
from kcrprune.training import step as step_module
from kcrprune.training.images.batches import Batches
from kcrprune.training.pace import Pace
from kcrprune.training.step import Training

CPU = torch.device("cpu")
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches() -> Batches:
    return Batches(DATA, 7, seed=0, stage="test")


def squares(model: nn.Module, at_once: int = 1000) -> Callable[[Tensor, Tensor], Loss]:
    """Mean squared error of a network that memory suffices for with so many images."""

    def loss(x: Tensor, y: Tensor) -> Loss:
        features = model(x)
        if len(x) > at_once:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        error = (features - y).square().mean()
        return Loss(error, {"loss": error.detach()}, features.detach())

    return loss


def training(model: nn.Module, loss: Callable[[Tensor, Tensor], Loss] | None = None, **options: Any) -> Training:
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), lr=0.01)
    return Training("test", loss or squares(model), optimizer, CPU, seed=0, pace=Pace(12), **options)


def run_(training: Training, count: int) -> list[Loss]:
    stream = batches().from_step(training.done)
    losses = []
    for _ in range(count):
        losses.append(training.step_(next(stream)))
        training.tell_(losses[-1].parts)
    return losses


def assert_near(model: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= tolerance


@pytest.mark.parametrize(("at_once", "parts"), [(6, 4), (4, 4), (2, 2), (1, 1)])
def test_a_batch_that_does_not_fit_is_taken_in_parts_and_the_step_is_the_same(at_once: int, parts: int):
    whole, halved = network(), network()
    events: list[Event] = []
    expected = run_(training(whole, clip_grad=0.1), 3)
    found = run_(training(halved, squares(halved, at_once), clip_grad=0.1, listener=events.append), 3)
    assert_near(whole, halved, 1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.features, theirs.features, atol=1e-5)
        assert all(torch.allclose(ours.parts[name], value, rtol=1e-4) for name, value in theirs.parts.items())
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[-1].endswith(f"images at once do not fit the memory; batches are taken in parts of {parts}")
    assert len(notes) == {4: 1, 2: 2, 1: 3}[parts]  # once for each halving, not for each step


def test_a_batch_of_which_it_is_known_how_much_fits_is_never_taken_whole():
    whole, in_parts, events = network(), network(), list[Event]()
    run_(training(whole), 3)
    run_(training(in_parts, squares(in_parts, at_once=3), at_once=3, listener=events.append), 3)
    assert_near(whole, in_parts, 1e-6)
    assert not any(isinstance(event, Note) for event in events)


def test_a_cpu_that_says_so_in_its_own_words_is_out_of_memory_too_and_other_errors_are_none():
    model = network()
    plain, asked = squares(model), []

    def loss(x: Tensor, y: Tensor) -> Loss:
        asked.append(len(x))
        if len(x) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        if len(asked) > 4:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return plain(x, y)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_(training(model, loss), 3)
    assert asked == [7, 4, 3, 4, 3]


def test_memory_for_not_one_image_is_an_error():
    model = network()
    with pytest.raises(ConfigError, match="test: not one image fits the memory of cpu"):
        run_(training(model, squares(model, at_once=0)), 1)


@pytest.mark.parametrize("every", [1, 4])
def test_what_is_no_number_is_named_with_its_stage_and_step(every: int, monkeypatch):
    monkeypatch.setitem(step_module.READ_EVERY, "cpu", every)
    model = network()
    plain, events = squares(model), []

    def loss(x: Tensor, y: Tensor) -> Loss:
        return plain(x, y * (torch.inf if learning.done == 4 else 1))

    learning = training(model, loss, listener=events.append)
    with pytest.raises(DivergedError, match=r"^test, step 5: loss is inf, so the training diverged; a lower"):
        run_(learning, 12)
    assert learning.done == (5 if every == 1 else 8)
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [row["step"] for row in learning.history] == [1, 2, 3, 4, 5]


def at_steps(model: nn.Module, steps: Sequence[int], learning: list[Training]) -> Callable[[Tensor, Tensor], Loss]:
    """A loss that is a number, and whose slope along the last bias is infinite at some steps."""
    plain, bias = squares(model), model[3].bias  # type: ignore[index]

    def loss(x: Tensor, y: Tensor) -> Loss:
        found = plain(x, y)
        steep = (0 * bias).abs().sum().sqrt() if learning[0].done + 1 in steps else 0
        return replace(found, total=found.total + steep)

    return loss


@pytest.mark.parametrize("every", [1, 4])
def test_a_batch_whose_gradient_is_no_number_is_passed_over(every: int, monkeypatch):
    monkeypatch.setitem(step_module.READ_EVERY, "cpu", every)
    model, events = network(), []
    learning: list[Training] = []
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    learning.append(training(model, at_steps(model, (2, 3, 5), learning), optimizer=optimizer, listener=events.append))
    run_(learning[0], 12)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert [note.partition(":")[0] for note in notes] == ["test, step 2", "test, step 3", "test, step 5"]
    assert notes[0].endswith("gradient_norm of 3.bias is nan; this batch was passed over")

    plain = network()  # which never sees those batches
    stream, kept = batches().from_step(0), training(plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
    for step in range(1, 13):
        batch = next(stream)
        if step not in (2, 3, 5):
            kept.step_(batch)
    assert_near(model, plain)


def test_three_gradients_in_a_row_that_are_no_numbers_are_named_with_their_tensor(monkeypatch):
    model, learning = network(), []
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.01)
    learning.append(training(model, at_steps(model, (1, 3, 4, 5), learning), optimizer=optimizer))
    with pytest.raises(
        DivergedError, match=r"^test, step 5: gradient_norm of 3\.bias is nan, so the training diverged"
    ):
        run_(learning[0], 12)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_figures_read_together_are_those_read_one_by_one(monkeypatch):
    rows = []
    for every in (1, 5):
        monkeypatch.setitem(step_module.READ_EVERY, "cpu", every)
        events: list[Event] = []
        learning = training(network(), listener=events.append)
        run_(learning, 12)
        assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 13))
        rows.append(learning.history)
    assert rows[0] == rows[1]


def test_a_step_waits_for_nothing(monkeypatch):
    def refuse(self: Tensor, *_: Any) -> None:
        raise AssertionError("a figure was read")

    model = network(0.5)
    learning = training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    batch = next(batches().from_step(0))
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    learning.step_(batch)


def test_a_training_that_goes_on_from_a_snapshot_ends_as_one_that_was_not_stopped():
    def scheduled(model: nn.Module, done: int = 0) -> Training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return training(model, optimizer=optimizer, schedule=schedule, done=done)

    whole, stopped = network(0.5), network(0.5)
    run_(scheduled(whole), 12)
    before = scheduled(stopped)
    run_(before, 5)
    resumed = network(0.5)
    resumed.load_state_dict(stopped.state_dict())
    torch.manual_seed(99)  # of no effect
    after = scheduled(resumed, done=5)
    after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    assert after.schedule is not None
    assert before.schedule is not None
    after.schedule.load_state_dict(before.schedule.state_dict())
    run_(after, 7)
    assert_near(whole, resumed)


def test_only_what_the_optimiser_holds_gets_a_gradient():
    model = network()
    last = model[3]  # type: ignore[index]
    run_(training(model, optimizer=torch.optim.SGD(last.parameters(), lr=0.1)), 1)
    assert all(parameter.grad is None for parameter in model[0].parameters())  # type: ignore[index]
    assert_near(model[0], network()[0])  # type: ignore[index]
