"""Where a run computes and how exactly: what is asked for, what is there, and what stays as it was afterwards."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.events import Note
from kcrprune.method.objective import UNLABELLED, Loss, Objective, feature_distance, logit_distance, relative_distances
from kcrprune.training import precision
from kcrprune.training.losses import make_objective
from kcrprune.training.portions import Portions

CPU = torch.device("cpu")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, fault: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(precision, "gpu_fault", lambda device: fault)


@pytest.mark.parametrize(
    ("asked", "count", "fault", "found"),
    [
        ("cpu", 2, None, "cpu"),
        ("auto", 0, None, "cpu"),
        ("auto", 1, None, "cuda"),
        ("auto", 1, "too old", "cpu"),
        ("cuda", 1, None, "cuda"),
        ("cuda:1", 2, None, "cuda:1"),
    ],
)
def test_a_device_is_what_is_asked_for_and_auto_a_gpu_that_works(monkeypatch, asked, count, fault, found):
    gpus(monkeypatch, count, fault)
    assert precision.available_device(asked) == found


@pytest.mark.parametrize(
    ("asked", "count", "fault", "told"),
    [
        ("cuda", 0, None, r"device 'cuda' is not here \(this machine has 0 CUDA devices\); use auto or cpu"),
        ("cuda:2", 2, None, r"device 'cuda:2' is not here \(this machine has 2 CUDA devices\)"),
        ("cuda:1", 2, "too old", r"device 'cuda:1' is here but does not work \(too old\); use cpu, or mend its driver"),
    ],
)
def test_a_device_that_is_not_to_be_had_is_told(monkeypatch, asked, count, fault, told):
    gpus(monkeypatch, count, fault)
    with pytest.raises(ConfigError, match=told):
        precision.available_device(asked)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("wanted", "rounded"), [("fp32", False), ("auto", True), ("bf16", True)])
def test_how_torch_computes_is_set_inside_and_comes_back(monkeypatch, deterministic, wanted, rounded):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def now() -> tuple[bool, bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), matmul.allow_tf32, cudnn.allow_tf32  # type: ignore[attr-defined]

    def compute() -> None:
        with precision.arithmetic(RunConfig(deterministic=deterministic, precision=wanted)):
            assert now() == (deterministic, rounded, rounded)
            raise ZeroDivisionError

    before = now()
    with pytest.raises(ZeroDivisionError):
        compute()
    assert now() == before


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"WORLD_SIZE is '2' .* \(`unset WORLD_SIZE LOCAL_RANK`\)"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"OMPI_COMM_WORLD_SIZE is '4' .*`unset OMPI_COMM_WORLD_SIZE`"),
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK is '0' .*`unset LOCAL_RANK`"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "1", "PMI_SIZE": "1", "LOCAL_RANK": "-1"}, None),
        ({}, None),
    ],
)
def test_what_is_one_process_is_not_started_as_several(monkeypatch, variables, told):
    for name in (*precision.SIZES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if told is None:
        precision.require_one_process()
        return
    with pytest.raises(ConfigError, match=told):
        precision.require_one_process()


def full(limit: int) -> Any:
    """What fails beyond so many images at once."""
    asked: list[int] = []

    def act(at_once: int) -> list[int]:
        asked.append(at_once)
        if at_once > limit:
            raise RuntimeError("CUDA out of memory")
        return asked

    return act


@pytest.mark.parametrize(("images", "limit", "asked"), [(8, 8, [8]), (8, 2, [8, 4, 2]), (7, 3, [7, 4, 2]), (1, 1, [1])])
def test_where_memory_runs_out_half_as_many_are_taken_and_that_is_told_and_remembered(images, limit, asked):
    notes: list[Any] = []
    portions = Portions("score", CPU, notes.append)
    assert portions.of(images, full(limit)) == asked
    assert portions.at_once == (asked[-1] if len(asked) > 1 else None)
    assert notes == [
        Note(f"score: {before} images at once do not fit the memory; batches are taken in parts of {after}")
        for before, after in pairwise(asked)
    ]
    assert portions.of(images, full(images)) == [asked[-1]], "the next time at once"


def test_not_one_image_another_error_and_what_was_shared_are_not_tried_again(monkeypatch):
    with pytest.raises(ConfigError, match=r"^score: not one image fits the memory of cpu; choose another device"):
        Portions("score", CPU).of(4, full(0))

    def wrong(at_once: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Portions("score", CPU).of(4, wrong)

    def shared(at_once: int) -> None:
        processes.SENT.calls += 1
        raise MemoryError("out of memory")

    monkeypatch.setattr(processes, "SENT", processes.Sent())
    with pytest.raises(MemoryError):
        Portions("score", CPU).of(4, shared)


def test_batches_are_divided_alike_whatever_their_size():
    def act(parts: list[torch.Tensor]) -> list[int]:
        if max(map(len, parts)) > 3:
            raise MemoryError
        return [len(part) for part in parts]

    assert Portions("score", CPU).of_batches([torch.ones(6), torch.ones(4)], act) == [3, 3, 3, 1]


def loss(value: float, images: int) -> Loss:
    return Loss(torch.tensor(value), {"task": torch.tensor(2 * value)}, torch.full((images, 2), value))


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_by_images():
    one = loss(1.0, 2)
    assert Loss.mean([(1.0, one)]) is one
    found = Loss.mean([(0.25, loss(4.0, 1)), (0.75, loss(8.0, 3))])
    assert (float(found.total), float(found.parts["task"])) == (7.0, 14.0)
    assert found.features.tolist() == [[4.0, 4.0], *[[8.0, 8.0]] * 3]


LOGITS, WANTED = (
    torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)
)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distances_are_those_of_their_formulas(temperature: float):
    p = (WANTED / temperature).softmax(1)
    q = (LOGITS / temperature).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean() * temperature**2
    assert float(logit_distance(LOGITS, WANTED, temperature)) == pytest.approx(float(kl))
    each = [float((y - y0) @ (y - y0) / (y0 @ y0)) for y, y0 in zip(LOGITS, WANTED, strict=True)]
    assert relative_distances(LOGITS.view(5, 2, 2), WANTED.view(5, 2, 2)).tolist() == pytest.approx(each)
    assert float(feature_distance(LOGITS, WANTED, temperature)) == pytest.approx(sum(each) / 5)
    assert relative_distances(torch.ones(1, 2), torch.zeros(1, 2)).isfinite().all()


class Known(nn.Module):
    """A network whose outputs are its images times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.head.weight)
        self.num_classes = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


@pytest.mark.parametrize("outputs", ["classes", "features"])
@pytest.mark.parametrize(("use_labels", "use_dense"), [(True, False), (False, True), (True, True)])
def test_an_objective_adds_up_the_parts_that_are_asked_for(outputs: Any, use_labels: bool, use_dense: bool):
    images, labels = LOGITS.float(), torch.tensor([0, 1, 2, UNLABELLED, 3])
    objective = Objective(
        dense=lambda images: WANTED,
        use_labels=use_labels,
        use_dense=use_dense,
        kernel_weight=0.5,
        smoothing=0.1,
        temperature=2.0,
        outputs=outputs,
    )
    found = objective(Known(), images, labels)
    seen = labels != UNLABELLED
    log = images.log_softmax(1)
    smoothed = 0.9 * log[seen].gather(1, labels[seen, None]).squeeze(1) + 0.1 * log[seen].mean(1)
    expected = {}
    if use_labels:
        expected["labels"] = float(-smoothed.mean())
    if use_dense:
        distance = logit_distance if outputs == "classes" else feature_distance
        expected["distill"] = float(distance(images, WANTED.float(), 2.0))
    assert {name: float(part) for name, part in found.parts.items()} == pytest.approx(
        expected | {"loss": sum(expected.values())}, rel=1e-5
    )
    assert torch.equal(found.features, images)
    assert not found.features.requires_grad
    assert found.total.requires_grad
    assert not any(part.requires_grad for part in found.parts.values())


@pytest.mark.parametrize(
    ("changes", "labelled", "outputs", "uses"),
    [
        ({}, True, "classes", (True, True)),
        ({}, False, "classes", (False, True)),
        ({}, True, "features", (False, True)),
        ({"labels": False}, True, None, (False, True)),
        ({"task": "distill"}, True, "classes", (False, True)),
        ({"task": "labels"}, True, "classes", (True, False)),
    ],
)
def test_a_task_takes_labels_where_there_are_some_that_count(changes, labelled, outputs, uses):
    config = RunConfig(kernel_norm="raw", smoothing=0.2, distill_temperature=3, kernel_weight=0.7, **changes)
    found = make_objective(config, nn.Identity(), labelled=labelled, outputs=outputs)
    assert (found.use_labels, found.use_dense) == uses
    assert (found.relative, found.smoothing, found.temperature, found.kernel_weight) == (False, 0.2, 3, 0.7)


@pytest.mark.parametrize(
    ("labelled", "outputs", "labels"), [(False, "classes", True), (True, "features", True), (True, None, False)]
)
def test_a_task_of_labels_without_any_is_refused(labelled, outputs, labels):
    with pytest.raises(ConfigError, match="needs labelled images and a network of classes; use task 'distill'"):
        make_objective(RunConfig(task="labels", labels=labels), nn.Identity(), labelled=labelled, outputs=outputs)
