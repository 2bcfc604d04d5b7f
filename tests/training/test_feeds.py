"""Batches of a user's loader: as many as a run takes, told apart by content, divided, and dealt out by address."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError, DataError
from kcrprune.families import Feed
from kcrprune.families.given import Use, described, glimpse, shown, tensors_in
from kcrprune.method.objective import UNLABELLED
from kcrprune.training import feeds
from kcrprune.training.feeds import FeedBatches, divide_feeds, fingerprint, read_feeds, users_loss
from kcrprune.training.parts import HELD_OUT
from kcrprune.training.randomness import generator

PLAIN = Use()
SMALL = RunConfig(
    calibration_images=10, score_images=4, recover_steps=0, search_steps=0, batch_size=8, search_split=0.5
)


def batch(images: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((images, 3, 2, 2), value)


def batches(*sizes: int) -> list[Feed]:
    """Batches that are told apart by the values of their images."""
    return [Feed(batch(size, number), size) for number, size in enumerate(sizes)]


class Counted:
    """A loader that learns how many of its batches were asked for."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.asked += 1
            yield batch(self.size)


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, HELD_OUT + 10),
        ({"calibration_images": 4, "score_images": 20}, HELD_OUT + 20),
        ({"recover_steps": 5}, HELD_OUT + 40),
        ({"search_steps": 9, "recover_steps": 5}, HELD_OUT + 72),
        ({"epochs": 1}, feeds.KEPT),
        ({"calibration_images": 9999}, feeds.KEPT),
    ],
)
@pytest.mark.parametrize("size", [1, 7])
def test_a_loader_is_read_as_far_as_a_run_needs(changes: dict[str, Any], images: int, size: int):
    loader = Counted(size)
    found = read_feeds(loader, PLAIN, SMALL.model_copy(update=changes))
    assert loader.asked == len(found) == -(-images // size)
    assert sum(map(len, found)) >= images


def test_a_loader_that_ends_is_read_whole_and_one_without_images_is_refused():
    sizes = [len(feed) for feed in read_feeds([batch(3), batch(0), batch(2)], PLAIN, SMALL)]
    assert sizes == [3, 2], "an empty batch is none"
    for empty in ([], [batch(0)], iter(())):
        with pytest.raises(
            DataError, match=r"^the loader \(\w+\) gives no images; a loader can be iterated over again"
        ):
            read_feeds(empty, PLAIN, SMALL)


def test_batches_are_told_apart_by_every_tensor_in_them():
    def print_of(*made: Any) -> str:
        return fingerprint([Feed(each, 2) for each in made])

    plain = {"x": torch.arange(4.0), "n": {"y": torch.ones(2)}, "text": "a"}
    assert print_of(plain) == print_of({**plain, "text": "b"}), "what is no tensor is not looked at"
    strided = {"x": torch.arange(8.0)[::2] / 2, "n": {"y": torch.ones(2)}, "text": "a"}
    assert print_of(plain) == print_of(strided)
    others = [
        {**plain, "x": torch.arange(4.0) + 1},
        {**plain, "x": torch.arange(4)},
        {**plain, "x": torch.arange(4.0).reshape(2, 2)},
        {**plain, "n": {"z": torch.ones(2)}},
        {"x": torch.arange(4.0)},
    ]
    assert len({print_of(each) for each in (plain, *others)}) == 6
    assert print_of(plain, others[0]) != print_of(others[0], plain)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 13])
def test_which_batch_is_a_step_follows_from_its_address(step: int):
    dealt = FeedBatches(batches(1, 2, 3, 4, 5), seed=7, stage="recover")
    assert (len(dealt), dealt.replaced.images, dealt.waited) == (5, 15, 0.0)
    order = []
    for epoch in range(5):
        order += torch.randperm(5, generator=generator(7, "recover", epoch, "order")).tolist()
    found = list(islice(dealt.from_step(step), 10))
    assert [len(feed) - 1 for feed, _ in found] == order[step : step + 10]
    for feed, labels in found:
        assert labels.tolist() == [UNLABELLED] * len(feed)


def numbers(parts: Any) -> list[int]:
    """Which batches these are."""
    of_each = [part[0] if isinstance(part, tuple) else part for part in parts]
    return [int(feed.batch.flatten()[0]) for feed in of_each]


@pytest.mark.parametrize("split", [0.3, 0.5, 1])
@pytest.mark.parametrize("count", [2, 5, 10, 20])
def test_what_decides_is_in_no_other_part_and_is_a_fifth_at_most(split: float, count: int):
    every = batches(*[4] * count)
    parts: Any = divide_feeds(every, SMALL.model_copy(update={"search_split": split}), 4.0)
    held, rest = numbers(parts.held_out), numbers(parts.training.feeds)
    assert sorted(held + rest) == list(range(count))
    assert len(held) == max(1, count // 5)
    weights, gates = numbers(parts.weights.feeds), numbers(parts.gates.feeds)
    if split == 1 or len(rest) == 1:
        assert weights == gates == rest
    else:
        assert weights + gates == rest
        assert len(weights) == max(1, min(round(split * len(rest)), len(rest) - 1))
    assert numbers(parts.calibration) == rest[:2], "ten images are two batches of four"
    assert numbers(parts.scoring) == rest[:1]
    assert parts.evaluation is None
    assert parts.replaced.images == 4 * count
    assert (parts.weights.stage, parts.gates.stage, parts.training.stage) == (
        *("search: weights", "search: gates", "recover"),
    )
    other: Any = divide_feeds(every, SMALL.model_copy(update={"seed": 1}), 4.0)
    assert count == 2 or numbers(other.held_out + other.training.feeds) != held + rest


def test_a_single_batch_serves_for_everything_and_large_outputs_leave_fewer_to_decide():
    (one,) = batches(3)
    parts: Any = divide_feeds([one], SMALL, 4.0)
    for part in (parts.held_out, parts.training.feeds, parts.weights.feeds, parts.gates.feeds, parts.calibration):
        assert numbers(part) == [0]
    every = batches(*[1] * 20)
    assert len(divide_feeds(every, SMALL, 4.0).held_out) == 4
    assert len(divide_feeds(every, SMALL, feeds.REMEMBERED / 2).held_out) == 2
    assert len(divide_feeds(every, SMALL, 9.0 * feeds.REMEMBERED).held_out) == 1


@pytest.mark.parametrize("given", [torch.tensor(2.0), torch.tensor([[2]]), torch.tensor(2.0, dtype=torch.float64)])
def test_a_loss_is_one_number(given: torch.Tensor):
    found = users_loss(Use(loss=lambda returned, batch: given * returned * batch), 3, 5)
    assert (found.shape, found.dtype, float(found)) == ((), torch.float32, 30.0)


@pytest.mark.parametrize(
    ("given", "kind"), [(2.0, "float"), (None, "NoneType"), (torch.ones(2), "Tensor"), ({}, "dict")]
)
def test_what_is_no_number_is_no_loss(given: Any, kind: str):
    with pytest.raises(DataError, match=f"^loss gives {kind}; it has to give one number as a tensor"):
        users_loss(Use(loss=lambda returned, batch: given), None, None)


def test_a_loss_that_fails_is_named_with_what_it_was_given():
    def wrong(returned: Any, batch: Any) -> Any:
        return batch["absent"]

    with pytest.raises(ConfigError, match=r"^loss fails on \{x: a tensor \(2,\)\} \(KeyError: 'absent'\)$"):
        users_loss(Use(loss=wrong), None, {"x": torch.ones(2)})


X, Y = torch.ones(4, 2), torch.zeros(4)


@pytest.mark.parametrize(
    ("inputs", "given", "arguments"),
    [
        (None, X, ((X,), {})),
        (None, (X, Y), ((X, Y), {})),
        (None, [X], ((X,), {})),
        (None, {"x": X}, ((), {"x": X})),
        ("x", {"x": X, "y": Y}, ((), {"x": X})),
        (1, (X, Y), ((Y,), {})),
        ((1, 0), (X, Y), ((Y, X), {})),
        (["x", "y"], {"x": X, "y": Y, "z": 1}, ((), {"x": X, "y": Y})),
        (lambda batch: batch[0], (X, Y), ((X,), {})),
        (lambda batch: {"y": batch[1]}, (X, Y), ((), {"y": Y})),
        (lambda batch: (batch[1], batch[0]), (X, Y), ((Y, X), {})),
    ],
)
def test_a_batch_becomes_the_networks_arguments(inputs: Any, given: Any, arguments: Any):
    args, keywords = Use(inputs=inputs).arguments(given)
    assert len(args) == len(arguments[0])
    assert all(found is wanted for found, wanted in zip(args, arguments[0], strict=True))
    assert keywords.keys() == arguments[1].keys()
    assert all(keywords[name] is value for name, value in arguments[1].items())


@pytest.mark.parametrize(
    ("inputs", "given", "told"),
    [
        ("z", {"x": X}, r"inputs=\('z',\) does not fit a batch, which is \{x: a tensor \(4, 2\)\} \(KeyError: 'z'\)"),
        (2, (X, Y), r"which is tuple\(a tensor \(4, 2\), a tensor \(4,\)\) \(IndexError"),
        (lambda batch: batch.absent, X, r"^inputs fails on a tensor \(4, 2\) \(AttributeError: "),
    ],
)
def test_inputs_that_do_not_fit_are_told_with_the_batch(inputs: Any, given: Any, told: str):
    with pytest.raises(ConfigError, match=told):
        Use(inputs=inputs).arguments(given)


@pytest.mark.parametrize(
    ("outputs", "part", "names"),
    [(None, "vit", ("vit",)), ("logits", "", ("logits",)), (1, "", ("1",)), (["a", 0], "", ("a", "0")), (len, "x", ())],
)
def test_outputs_are_named_or_told_by_a_function(outputs: Any, part: str, names: tuple[str, ...]):
    assert Use(part=part, outputs=outputs).names == names


def test_a_feed_counts_its_first_tensor_or_list_of_tensors():
    assert len(Feed.of({"n": 3, "x": X}, PLAIN)) == 4
    assert len(Feed.of([[torch.ones(3), torch.ones(2)]], PLAIN)) == 2
    assert len(Feed.of((torch.tensor(7.0), X), PLAIN)) == 4, "a tensor without dimensions is no batch"
    for none in ({"n": 3}, [], [[]], torch.tensor(1.0)):
        with pytest.raises(DataError, match=r"^no tensor is among what the network is called with: "):
            Feed.of(none, PLAIN)


def test_a_feed_is_whole_and_moves_whole():
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    feed = Feed.of({"pair": Pair(X, "text"), "list": [Y], "x": X}, Use(inputs="x"))
    moved = feed.to(torch.device("meta"))
    assert {name: value.device.type for name, value in tensors_in(moved.batch)} == dict.fromkeys(
        ("pair.0", "list.0", "x"), "meta"
    )
    assert isinstance(moved.batch["pair"], Pair)
    assert moved.batch["pair"].y == "text"
    assert (len(moved), feed.split(4)) == (4, (feed,))
    with pytest.raises(ConfigError, match=r"^a batch of 4 images does not fit the memory; give a loader whose batches"):
        feed.split(3)


def test_little_of_batches_is_their_first_image_or_one_of_each_kind_of_shapes():
    kinds = [*batches(2, 2, 3, 2), Feed((X,), 4), Feed((X,), 4), Feed((X,), 4)]
    assert [kinds.index(each) for each in shown(kinds)] == [0, 1, 2, 4, 5]
    assert torch.equal(glimpse(X), X[:1])
    assert glimpse(kinds[0]) is kinds[0]
    (one,) = shown([X, X])
    assert torch.equal(one, X[:1])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (X, "a tensor (4, 2)"),
        ({"x": X, "n": 3}, "{x: a tensor (4, 2), n: int}"),
        ([X, (Y,)], "list(a tensor (4, 2), tuple(a tensor (4,)))"),
        (nn.Identity(), "Identity"),
        (None, "NoneType"),
    ],
)
def test_what_holds_tensors_is_described_by_kinds_and_shapes(value: Any, words: str):
    assert described(value) == words
