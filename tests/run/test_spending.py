"""Targets in time: on a machine whose clock counts MACs, and on machines that are slower than their table says."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune import pipeline
from kcrprune.config import RunConfig
from kcrprune.errors import BudgetError, ConfigError
from kcrprune.events import Note, StageStarted, ignore
from kcrprune.families import Contract, kept_widths
from kcrprune.measure.report import Timing
from kcrprune.measure.times import read_times
from kcrprune.method.budget import Scores, solve
from kcrprune.plan import PER_HEAD
from kcrprune.run import pricing, spending, timed
from kcrprune.run.context import Context, Record
from kcrprune.run.network import opened_groups
from kcrprune.run.pricing import Place, Times, times_of
from kcrprune.run.spending import Budget, planned
from tests.pipeline.test_compress import SHORT, save
from tests.tiny import TINY, Tiny, cost_of

HERE = Place("a machine", 1, 2, None)
PLAIN = {"axes": ("mlp_hidden", "attn_query", "attn_value"), "round_to": 4, "search_steps": 0, "recover_steps": 0}


def macs_as_time(calls: Any, **_: Any) -> list[list[float]]:
    """What a clock would show that counts MACs, in milliseconds."""
    found = []
    with torch.no_grad(), kept_widths(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for call, images in calls:
            with FlopCounterMode(display=False) as counter:
                call(images)
            found.append([counter.get_total_flops() / 2e6] * 7)
    return found


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "in_turn", macs_as_time)
    monkeypatch.setattr(timed, "in_turn", macs_as_time)


def told(config: RunConfig) -> Any:
    """A context that keeps what is said."""
    notes: list[tuple[str, bool]] = []
    context = SimpleNamespace(settings=config, record=Record(), notes=notes, checkpoint=Path("x.pth"))
    context.say = lambda text, warning=False: notes.append((text, warning))
    context.part = Context.part.__get__(
        SimpleNamespace(record=context.record, listener=ignore, device=torch.device("cpu"))
    )
    return context


def network_of(tiny: Tiny) -> Any:
    model = tiny.model()
    return SimpleNamespace(
        dense=model, name="tiny", cost=cost_of(model, tiny), before=None, inputs=lambda batch: tiny.images(batch)
    )


def scores_of(contract: Contract) -> Scores:
    draw = torch.Generator().manual_seed(0)
    return {
        group.key: torch.rand(
            (group.heads, group.units) if group.axis in PER_HEAD else (group.units,), generator=draw
        ).exp()
        for group in contract.groups
    }


@pytest.mark.parametrize("tiny", [TINY[i] for i in (0, 5, 9)], ids=lambda tiny: tiny.label)
def test_where_the_clock_counts_macs_a_plan_for_a_time_is_that_for_macs(tiny: Tiny, counting: None):
    network, config = network_of(tiny), RunConfig.model_validate({**PLAIN, "target_latency": 0.8})
    scores = scores_of(network.cost.contract)
    for_macs = solve(opened_groups(network.cost, config), scores, 0.8, "tiny")
    times = times_of(told(config), network, HERE)
    assert times.here
    budget = spending.budget(told(config), network, times)
    assert planned(context := told(config), network, budget, scores) == for_macs
    assert len(context.record.decisions["times"]) == 1, "the first plan is near enough"
    dense = times.table.dense_ms
    in_ms = RunConfig.model_validate({**PLAIN, "target_latency": f"{0.8 * dense}ms"})
    assert spending.budget(told(in_ms), network, times).target == pytest.approx(0.8)
    for asked, sentence in (
        (f"{2 * dense}ms", f"target {2 * dense:.12g}ms.* takes 1.000 of the dense time already"),
        (f"{dense / 1e3}ms", r"which is 0\.001 of .* ms, of the dense time is out of reach: .* go down to 0\."),
        (0.01, r"target 0\.01 of the dense time is out of reach"),
    ):
        wrong = RunConfig.model_validate({**PLAIN, "target_latency": asked})
        with pytest.raises(BudgetError, match=sentence):
            spending.budget(told(wrong), network, times)


def clock(ratio: Callable[[float], float], width: float = 0.0) -> Callable[..., Timing]:
    """A clock by which a network takes this ratio for its share of the MACs, give or take `width`."""

    def speed(dense: nn.Module, pruned: nn.Module, inputs: Any, share: float, *_: Any) -> Timing:
        found = ratio(share)
        ends = {"ratio": found, "ratio_low": found - width, "ratio_high": found + width}
        return Timing(batch=1, runtime="x", threads=1, rounds=7, p50_ms=found, p90_ms=found, **ends)

    return speed


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Times, Scores]:
    """A network, its table, and scores."""
    network, config = network_of(TINY[0]), RunConfig.model_validate({**PLAIN, "target_latency": 0.8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pricing, "in_turn", macs_as_time)
        return network, times_of(told(config), network, HERE), scores_of(network.cost.contract)


@pytest.fixture
def for_time(measured: tuple[Any, Times, Scores]) -> tuple[Any, Any, Budget, Scores]:
    """Context, network, budget of 0.8 and scores."""
    network, times, scores = measured
    context = told(RunConfig.model_validate({**PLAIN, "round_to": 1, "target_latency": 0.8}))
    return context, network, spending.budget(context, network, times), scores


@pytest.mark.parametrize("part", [0.7, 0.85, 1.25])
def test_a_machine_on_which_a_cut_saves_another_part_is_met_within_three_percent(for_time, part, monkeypatch):
    context, network, budget, scores = for_time
    monkeypatch.setattr(spending, "speed_of", real := clock(lambda share: 1 - part * (1 - share), width=0.01))
    plan = planned(context, network, budget, scores)
    share = network.cost.predicted(plan) / network.cost.dense
    taken = real(None, None, None, share)
    assert 0.97 * 0.8 <= (taken.ratio or 0) < (taken.ratio_high or 1) <= 1.03 * 0.8
    assert 2 <= len(context.record.decisions["times"]) <= 3
    assert [warning for _, warning in context.notes] == [False]


def test_a_time_that_no_plan_takes_is_refused_and_an_uneven_clock_is_told_of(for_time, monkeypatch):
    context, network, budget, scores = for_time
    monkeypatch.setattr(spending, "speed_of", clock(lambda share: 0.9 + 0.1 * share))
    with pytest.raises(BudgetError, match=r"target 0\.8 of the dense time is out of reach: the smallest plan .* 0\.9"):
        planned(context, network, budget, scores)
    monkeypatch.setattr(spending, "speed_of", clock(lambda share: share, width=0.2))
    planned(context, network, budget, scores)
    assert [text.partition(":")[0] for text, warning in context.notes if warning] == ["the target may be missed"]
    assert len(context.record.decisions["times"]) <= spending.PLANS


def test_a_table_of_another_machine_plans_and_no_clock_is_asked(for_time, monkeypatch):
    context, network, budget, scores = for_time
    assert budget.times is not None
    table = budget.times.table.model_copy(update={"threads": 7})
    monkeypatch.setattr(pricing, "in_turn", None)
    monkeypatch.setattr(spending, "speed_of", None)
    foreign = times_of(context, network, Place("a machine", 1, 2, table))
    assert not foreign.here
    plan = planned(context, network, spending.budget(context, network, foreign), scores)
    assert 0.79 < network.cost.predicted(plan) / network.cost.dense <= 0.8
    other = network_of(TINY[5])
    with pytest.raises(ConfigError, match=r"the table of times has no .* of timm.*, as layers\.0\.blocks\.0"):
        spending.budget(context, other, times_of(context, other, Place("a machine", 1, 2, table)))


def test_a_run_for_a_time_goes_on_and_passes_its_table_on(counting: None, tmp_path: Path, monkeypatch):
    base = {**SHORT.model_dump(exclude={"target_flops"}), **PLAIN, "target_latency": 0.8, "bench": True}
    base |= {"axes": ("mlp_hidden", "attn_value"), "generated_images": 24, "refit": False}
    config, checkpoint = RunConfig.model_validate(base), save(TINY[0], tmp_path / "dense.safetensors")

    def stop(event: object) -> None:
        if isinstance(event, StageStarted) and event.stage == "measure dense":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(checkpoint, config, tmp_path / "a" / "run", stop)
    monkeypatch.setattr(pricing, "in_turn", None)
    notes: list[object] = []
    result = pipeline.compress(checkpoint, config, tmp_path / "a" / "run", notes.append)
    assert any(isinstance(note, Note) and note.text.startswith("continues after: time branches") for note in notes)
    share = (result.comparison.after.macs or 0) / (result.comparison.before.macs or 1)
    assert 0.79 < share <= 0.8
    assert result.speed is not None
    assert result.speed.ratio == pytest.approx(share)
    table = result.folder / "times.json"
    assert read_times(table).batch == 1
    low = RunConfig.model_validate(base | {"latency_table": str(table), "target_latency": "5%"})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(BudgetError, match=r"target 0\.05 of the dense time is out of reach"):
        pipeline.compress(checkpoint, low, tmp_path / "b" / "run", ignore)
    assert set(tmp_path.rglob("*")) == before, "a table that is given refuses before there is a folder"
