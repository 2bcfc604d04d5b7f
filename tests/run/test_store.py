"""Results as files: whole or absent, and equal to what was kept."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from kcrprune.errors import KcrPruneError
from kcrprune.measure.report import Accuracy
from kcrprune.run.context import Record
from kcrprune.run.store import Codec, Key, Result, Store

KEY = Key("score", "0123456789abcdef")


class Example(Result):
    scores: dict[str, dict[str, torch.Tensor]]
    logits: list[torch.Tensor]
    accuracy: Accuracy | None
    distance: float


def example():
    draw = torch.Generator().manual_seed(0)
    return Example(
        scores={"blocks.0": {"heads": torch.rand(3, generator=draw)}, "blocks.1": {}},
        logits=[torch.rand(4, 2, generator=draw).T, torch.ones(2, dtype=torch.float64)],
        accuracy=Accuracy(images=3, top1=1 / 3),
        distance=math.nan,
    )


def assert_same(found, wanted):
    assert found.scores.keys() == wanted.scores.keys()
    assert torch.equal(found.scores["blocks.0"]["heads"], wanted.scores["blocks.0"]["heads"])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.logits, wanted.logits, strict=True))
    assert found.accuracy == wanted.accuracy
    assert math.isnan(found.distance)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.mark.parametrize("through_files", [True, False])
def test_a_result_comes_back_bit_by_bit(store, through_files):
    codec, wanted = Codec(Example), example()
    packed = codec.pack(wanted)
    wanted_now = codec.unpack(packed)
    for tensor in wanted.logits:  # what was packed shares no memory with what was given
        tensor.zero_()
    store.keep(KEY, packed, Record(notes=["a"], history={"search": [{"loss": None}]}))
    found = store.result(KEY, codec) if through_files else wanted_now
    assert_same(found, example())
    assert store.record(KEY).history == {"search": [{"loss": None}]}


@pytest.mark.parametrize(("kind", "value"), [(Example | None, None), (str, "search"), (float, 0.1)])
def test_results_need_no_tensor(store, kind, value):
    codec = Codec(kind)
    store.keep(KEY, codec.pack(value), Record())
    assert store.result(KEY, codec) == value


def test_a_result_that_could_not_be_written_is_not_there(store, monkeypatch):
    packed = Codec(Example).pack(example())
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(KcrPruneError, match="score-0123456789abcdef: No space left on device"):
            store.keep(KEY, packed, Record())
    assert not store.has(KEY)
    assert not list(store.folder.iterdir())
    store.keep(KEY, packed, Record())
    assert store.has(KEY)


@pytest.mark.parametrize("links", [True, False])
def test_what_another_store_has_is_taken_over(store, tmp_path_factory, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    codec, other = Codec(Example), Store(tmp_path_factory.mktemp("other"), {store.folder: "a (which differs in lr)"})
    assert not other.has(KEY)
    store.keep(KEY, codec.pack(example()), Record(notes=["kept"]))
    assert other.has(KEY)
    assert other.source(KEY) == "a (which differs in lr)"
    assert (other.record(KEY), other.source(Key("x", "y"))) == (store.record(KEY), None)
    shutil.rmtree(store.folder / str(KEY))
    assert_same(other.result(KEY, codec), example())
