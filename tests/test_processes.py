"""Which of several processes this is, by what a launcher says, and which part of the work is its own."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kcrprune import processes
from kcrprune.errors import LostProcessError

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What a launcher says; None: nothing."""

    def say(**changes: str | None) -> None:
        for name, value in (LAUNCHED | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return say


@pytest.mark.parametrize(
    ("changes", "launched", "silent"),
    [
        ({}, True, True),
        ({"RANK": "0"}, True, False),
        ({"WORLD_SIZE": "1"}, False, False),
        ({"WORLD_SIZE": ""}, False, False),
        *(({name: None}, False, False) for name in LAUNCHED),
    ],
)
def test_several_processes_are_one_run_where_a_launcher_says_all_of_it(said, changes, launched: bool, silent: bool):
    said(**changes)
    assert (processes.launched(), processes.is_silent()) == (launched, silent)


@pytest.mark.parametrize(("local", "tells"), [("0", True), ("1", False)])
def test_before_they_know_each_other_one_of_each_machine_tells_of_a_failure(said, local: str, tells: bool):
    said(LOCAL_RANK=local)
    assert processes.may_tell_failure() == tells
    said(WORLD_SIZE=None, LOCAL_RANK=local)
    assert processes.may_tell_failure(), "alone there is nobody else"


class Group:
    """A group of processes in one: what all of them have is what `others` says."""

    class ReduceOp:
        MAX = "max"

    def __init__(self, rank: int, count: int, others: Any = None, backend: str = "gloo") -> None:
        self.rank, self.count, self.others, self.backend = rank, count, others or {}, backend
        self.calls: list[str] = []
        self.fails: Exception | None = None

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.count

    def get_backend(self) -> str:
        return self.backend

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def all_reduce(self, tensor: torch.Tensor, how: str = "sum") -> None:
        self.calls.append("all_reduce")
        if self.fails:
            raise self.fails
        if how == "sum":
            tensor.mul_(self.count)
        else:
            tensor.clamp_(min=self.others.get("longest", 0))

    def all_gather(self, found: list[torch.Tensor], own: torch.Tensor) -> None:
        self.calls.append("all_gather")
        for each in found:
            each.copy_(own)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        self.calls.append("broadcast")
        assert source == 0
        if self.rank > 0:
            tensor.copy_(self.others["sent"].pop(0))


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Group]:
    """Joins this process to others that are not there."""

    def join(rank: int = 0, count: int = 2, **others: Any) -> Group:
        group = Group(rank, count, others)
        monkeypatch.setitem(sys.modules, "torch.distributed", group)  # type: ignore[arg-type]
        monkeypatch.setattr(processes, "SENT", processes.Sent())
        return group

    return join


def test_alone_everything_is_ones_own_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_call", None)
    value = torch.ones(2)
    assert (processes.rank(), processes.count()) == (0, 1)
    assert processes.own([1, 2, 3]) == [1, 2, 3]
    assert processes.places([3, 4]) == [(0, 3), (0, 4)]
    assert processes.summed(value) is value
    assert processes.rows_of_all([value, value]) == [value, value]
    assert processes.of_all({"a": 1}) == [{"a": 1}]
    assert processes.of_first(lambda: 7) == 7
    assert processes.tensors_of_first(lambda: {"x": value})["x"] is value
    with processes.entered_by_first(nullcontext(Path("here"))) as folder:
        assert folder == Path("here")


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("items", [0, 1, 5, 6, 12])
def test_parts_are_adjacent_whole_and_differ_by_one_at_most(joined, count: int, items: int):
    parts = []
    for rank in range(count):
        joined(rank, count)
        parts.append(processes.own(list(range(items))))
    assert [item for part in parts for item in part] == list(range(items))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    rows = torch.arange(items * 2).reshape(items, 2)
    assert processes.own(rows).tolist() == rows.tolist()[items - sizes[-1] :]


def test_a_sum_leaves_what_it_is_of_alone_and_its_bytes_are_counted(joined):
    group = joined(0, 3)
    value = torch.arange(4.0, dtype=torch.float64)
    assert processes.summed(value).tolist() == [0, 3, 6, 9]
    assert value.tolist() == [0, 1, 2, 3]
    assert (processes.SENT.calls, processes.SENT.bytes) == (1, 32)
    assert group.calls == ["all_reduce"]


def test_plain_data_are_padded_to_the_longest_and_come_from_all(joined):
    group = joined(1, 2, longest=50)
    assert processes.of_all({"é": [1, None, 2.5]}) == [{"é": [1, None, 2.5]}] * 2
    assert group.calls == ["all_reduce", "all_gather"]
    assert processes.SENT.bytes == 8 + 50


def as_bytes(data: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def test_what_the_first_has_is_made_by_it_alone(joined):
    joined(0, 2)
    assert processes.of_first(lambda: {"a": 1}) == {"a": 1}
    text = as_bytes({"a": 2})
    joined(1, 2, sent=[torch.tensor([len(text)]), text])
    assert processes.of_first(lambda: pytest.fail("it was called")) == {"a": 2}
    assert processes.SENT.bytes == 8 + len(text)


def test_tensors_of_the_first_have_its_types_and_shapes(joined):
    made = {"half": torch.arange(6.0).half().reshape(2, 3).T, "flag": torch.tensor(True)}
    group = joined(0, 2)
    found = processes.tensors_of_first(lambda: made)
    assert all(torch.equal(found[name], value) for name, value in made.items())
    assert group.calls == ["broadcast"] * 4
    forms = as_bytes([(name, str(value.dtype), list(value.shape)) for name, value in made.items()])
    sent = [value.contiguous().flatten().view(torch.uint8) for value in made.values()]
    joined(1, 2, sent=[torch.tensor([len(forms)]), forms, *sent])
    found = processes.tensors_of_first(lambda: pytest.fail("it was called"))
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        name: (value.dtype, value.tolist()) for name, value in made.items()
    }


def test_the_first_enters_a_folder_and_all_are_told_where_it_is(joined):
    text = as_bytes("there")
    joined(1, 2, sent=[torch.tensor([len(text)]), text])
    entered: Any = SimpleNamespace(__enter__=None, __exit__=None)
    with processes.entered_by_first(entered) as folder:
        assert folder == Path("there")


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_a_part_stand_at_their_place_in_the_whole(joined, monkeypatch: pytest.MonkeyPatch, first: int):
    joined(first, 2)
    monkeypatch.setattr(processes, "of_all", lambda sizes: [[2, 1], [3, 0]])
    monkeypatch.setattr(processes, "summed", lambda tensor: tensor)
    assert processes.places([2, 1]) == [(2 * first, 5), (first, 1)]
    mine = [[torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(3, 3), torch.ones(0, 3)]][first]
    found = processes.rows_of_all(mine)
    assert [each[:, 0].tolist() for each in found] == [[[1, 1, 0, 0, 0], [1]], [[0, 0, 1, 1, 1], [0]]][first]


def test_a_process_that_does_not_answer_ends_the_run_in_a_sentence_and_full_memory_in_its_own(joined):
    group = joined(0, 3)
    group.fails = RuntimeError("long story\nConnection closed by peer")
    with pytest.raises(
        LostProcessError, match=r"^another of the 3 processes has ended .* \(Connection closed by peer\)"
    ):
        processes.summed(torch.ones(1))
    group.fails = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        processes.summed(torch.ones(1))


def test_processes_that_do_not_meet_are_told_where_and_how_many(said):
    def fail() -> None:
        with processes.joining():
            raise ValueError("timed out\nand more")

    said(WORLD_SIZE=None)
    with pytest.raises(ValueError, match="timed out"):
        fail()
    said()
    with pytest.raises(
        LostProcessError, match=r"^the 3 processes of WORLD_SIZE did not all meet at localhost:29500 \(timed out\)"
    ):
        fail()
    with processes.joining():
        pass


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda"), ("gloo", "cpu"), ("mpi", "cpu")])
def test_what_is_sent_lies_where_the_group_can_reach_it(joined, backend: str, device: str):
    joined().backend = backend
    assert processes._device() == device


def test_a_group_of_one_or_none_is_nobody(joined, monkeypatch: pytest.MonkeyPatch):
    joined(0, 1)
    assert processes._group() is None
    for name in ("is_available", "is_initialized"):
        group = joined(0, 2)
        assert processes._group() is group
        monkeypatch.setattr(group, name, lambda: False)
        assert processes._group() is None
    monkeypatch.delitem(sys.modules, "torch.distributed")
    assert (processes.rank(), processes.count()) == (0, 1)
