"""Times of reports: whose they are, on how many threads, and what of the MACs saved is time saved."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.checkpoints.dense import Opened
from kcrprune.events import StageEnded, StageStarted, StepDone
from kcrprune.graphs import OnnxModel
from kcrprune.measure.bench import Bench, bench_of
from kcrprune.measure.report import BlockWidths, Timing
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.plan import Architecture, Preprocessing
from kcrprune.run import timed
from kcrprune.run.describe import file_bytes, kernel_figures, report_of_any, report_of_graph
from tests.measure.examples import report

SIZE = (3, 4, 6)


def opened(name: str) -> Opened:
    return Opened(
        model=nn.Sequential(nn.Flatten(), nn.Linear(72, 2)).eval(),
        architecture=Architecture(family="vit", name=name),
        preprocessing=Preprocessing(input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3),
        outputs="classes",
        class_names=None,
        layout="x",
        notes=(),
        path=Path(name),
        digest="",
        file_bytes=1,
        plan=None,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A clock by which the second network takes half of the first's time; it keeps what it was given."""
    asked: list[Any] = []

    def in_turn(calls: Any, *, seconds: float) -> list[list[float]]:
        asked.append((calls, seconds, torch.get_num_threads()))
        return [[8.0 / (number + 1)] * 7 for number in range(len(calls))]

    monkeypatch.setattr(timed, "in_turn", in_turn)
    return asked


def test_reports_get_a_time_for_each_batch_and_the_second_a_ratio(clock: list[Any]):
    told: list[Any] = []
    first, second = opened("a"), opened("b")
    reports = (report(macs=1000), report(macs=600))
    before = torch.get_num_threads()
    found = timed.timed([first, second], reports, Bench(batch=(1, 5), threads=before + 1), told.append)
    assert torch.get_num_threads() == before
    assert [threads for *_, threads in clock] == [before + 1] * 2
    assert [seconds for _, seconds, _ in clock] == [timed.SECONDS] * 2
    for (calls, *_), batch in zip(clock, (1, 5), strict=True):
        assert [call for call, _ in calls] == [first.model, second.model]
        assert [tuple(images.shape) for _, images in calls] == [(batch, *SIZE)] * 2
        assert torch.equal(calls[0][1], calls[1][1])
    for one, batch in zip(found[0].timings, (1, 5), strict=True):
        assert (one.batch, one.ratio, one.realised, one.p50_ms, one.threads) == (batch, None, None, 8.0, before + 1)
        assert (one.runtime, one.rounds) == ("PyTorch on the CPU", 7)
    for one in found[1].timings:
        assert (one.p50_ms, one.ratio) == (4.0, 0.5)
        assert one.realised == pytest.approx(0.5 / 0.4)
    assert [each.model_copy(update={"timings": ()}) for each in found] == list(reports)
    assert told[0] == StageStarted("time", 2)
    assert told[1:-1] == [StepDone("time", 1), StepDone("time", 2)]
    assert isinstance(told[-1], StageEnded)


def test_threads_come_back_where_a_network_fails(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(timed, "in_turn", fail)
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        timed.timed([opened("a")], (report(),), Bench(threads=before + 2), lambda event: None)
    assert torch.get_num_threads() == before


TIME = Timing(batch=1, runtime="x", threads=1, rounds=7, p50_ms=1, p90_ms=1)


@pytest.mark.parametrize(
    ("ratio", "saved", "realised"),
    [
        (0.8, 0.4, 0.5),
        (0.6, 0.4, 1.0),
        (1.2, 0.4, -0.5),
        (None, 0.4, None),
        (0.8, None, None),
        (0.8, 0.0, None),
        (0.8, -0.1, None),
    ],
)
def test_what_of_the_macs_saved_is_time_saved(ratio: Any, saved: Any, realised: Any):
    found = timed._realised(TIME.model_copy(update={"ratio": ratio}), saved)
    assert found.realised == (None if realised is None else pytest.approx(realised))


@pytest.mark.parametrize(
    ("first", "second", "saved"), [(1000, 700, 0.3), (1000, 1000, 0.0), (None, 700, None), (1000, None, None)]
)
def test_the_share_saved_is_that_of_the_first_networks_macs(first: Any, second: Any, saved: Any):
    found = timed._share_saved(report(macs=first), report(macs=second))
    assert found == (None if saved is None else pytest.approx(saved))


def test_a_cut_network_is_timed_against_the_dense_one_on_its_own_images(clock: list[Any]):
    dense, pruned = nn.Linear(2, 2), nn.Linear(2, 2)
    sizes: list[int] = []
    found = timed.speed_of(dense, pruned, lambda batch: sizes.append(batch) or torch.ones(batch, 2), 0.75, 3.0)
    assert (found.batch, found.ratio, found.realised, found.runtime) == (1, 0.5, 2.0, "PyTorch on the CPU")
    ((calls, seconds, _),) = clock
    assert [call for call, _ in calls] == [dense, pruned]
    assert seconds == 3.0
    assert timed.speed_of(dense, pruned, lambda batch: torch.ones(batch, 2), 0.75, 3.0, 16).batch == 16
    assert sizes == [1]
    assert (timed.usual_batch(torch.device("cpu")), timed.usual_batch(torch.device("cuda"))) == (1, 64)


def test_a_bench_is_checked_where_it_is_asked_for():
    assert bench_of(provider="onnx-cpu", batch=["1", "16"], threads=None) == Bench(provider="onnx-cpu", batch=(1, 16))
    for wrong, name in (
        ({"provider": "tpu"}, "provider = 'tpu'"),
        ({"batch": []}, r"batch = \[\]"),
        ({"threads": 0}, "threads = 0"),
    ):
        with pytest.raises(Exception, match=f"^{name} cannot work: "):
            bench_of(**wrong)


WIDTHS = BlockWidths(site="blocks.0", dense={"heads": 2}, kept={"heads": 1})


@pytest.mark.parametrize(
    ("known", "stated"),
    [
        ({}, ()),
        ({"parameters": 9}, ("parameters",)),
        ({"macs": 5, "dense_macs": 7}, ("macs", "dense_macs")),
        ({"parameters": 0, "blocks": (WIDTHS,)}, ("parameters", "blocks")),
        ({"blocks": ()}, ()),
    ],
)
def test_a_report_of_a_graph_says_what_is_the_graphs_own_word(known: dict[str, Any], stated: tuple[str, ...]):
    fields = ("parameters", "macs", "dense_macs", "blocks")
    record = SimpleNamespace(architecture="vit", family=None, **{name: known.get(name) for name in fields})
    graph: Any = SimpleNamespace(
        path=Path("in/m.onnx"),
        record=record,
        input_size=SIZE,
        outputs="features",
        parameters=11,
        macs=13,
        file_bytes=17,
    )
    found = report_of_graph(graph)
    assert found.stated == stated
    assert (found.source, found.layout, found.state) == ("in/m.onnx", "ONNX", "onnx")
    assert (found.parameters, found.macs, found.file_bytes, found.input_size) == (11, 13, 17, SIZE)
    assert (found.architecture, found.family, found.outputs) == ("vit", None, "features")
    assert (found.dense_macs, found.blocks) == (known.get("dense_macs"), known.get("blocks") or ())


def test_what_was_opened_is_reported_by_its_kind(monkeypatch: pytest.MonkeyPatch):
    graph = OnnxModel.__new__(OnnxModel)
    monkeypatch.setattr("kcrprune.run.describe.report_of_graph", lambda what: ("graph", what))
    monkeypatch.setattr("kcrprune.run.describe.report_of", lambda what: ("network", what))
    assert report_of_any(graph) == ("graph", graph)
    assert report_of_any(network := opened("a")) == ("network", network)


def test_the_size_of_a_folder_is_that_of_all_its_files(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"12345")
    assert (file_bytes(tmp_path / "x"), file_bytes(tmp_path)) == (3, 8)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_kernel_figures_are_those_of_the_spectrum(share: float):
    features = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = Covariance.empty(6)
    covariance.add_(features)
    found = kernel_figures(covariance, share)
    spectrum = torch.linalg.eigvalsh(features.T @ features / 20).flip(0)
    assert (found.rank, found.images) == (max(1, int(share * 6)), 20)
    assert found.tnn == pytest.approx(float(spectrum[found.rank :].sum()), abs=1e-12)
    assert found.tnn_relative == pytest.approx(found.tnn / float(spectrum.sum()), abs=1e-12)
