"""By whose plan a network is cut: the search's, where it is better by more than the error of the held-out images."""

from math import inf, nan, sqrt
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch

from kcrprune.config import load_config
from kcrprune.plan import ChannelPlan, Kept
from kcrprune.run import selecting
from kcrprune.run.context import Context, Record
from kcrprune.run.deadline import recovery_steps, search_steps
from kcrprune.run.ranking import Ranked, Searched
from kcrprune.run.selecting import Compared, select
from kcrprune.training.parts import Parts

IMAGES = torch.tensor([32.0, 32.0, 32.0, 16.0] * 2)


def compared(means: list[float], added: list[float], name: str = "distance") -> Compared:
    """From the mean losses of parts of the images, all twice, and what the search adds to them."""
    scores, search = torch.tensor(means * 2), torch.tensor((means, added)).sum(0).repeat(2)
    return Compared.of(
        name,
        torch.stack([scores * IMAGES, IMAGES], 1),
        torch.stack([search * IMAGES, IMAGES], 1),
    )


BETTER = compared([0.2, 0.3, 0.4, 0.5], [-0.02, -0.03, -0.02, -0.03])
WITHIN = compared([0.2, 0.3, 0.4, 0.5], [-0.09, 0.06, -0.05, 0.07])
WORSE = compared([0.2, 0.3, 0.4, 0.5], [0.02, 0.03, 0.02, 0.03])


def test_the_error_is_that_of_the_differences_and_not_of_the_losses():
    differences = torch.tensor([-0.02, -0.03, -0.02, -0.03] * 2)
    weighted = compared([1.0, 9.0, 3.0, 6.0], differences[:4].tolist())
    assert weighted.added == pytest.approx(float((differences * IMAGES).sum() / IMAGES.sum()), rel=1e-4)
    equal = torch.tensor([[3.0, 1.0], [5.0, 1.0]] * 4)
    found = Compared.of("distance", equal, equal + torch.tensor([[1.0, 0.0], [3.0, 0.0]] * 4))
    assert (found.scores, found.search, found.added) == (4, 6, 2)
    assert found.error == pytest.approx(sqrt(8 / 7) / sqrt(8))
    assert BETTER.lower
    assert not WITHIN.lower
    assert not compared([0.2, 0.3, 0.4, 0.5], [-0.04, 0.01, -0.03, 0.005]).lower, "one standard error is chance"
    assert not WORSE.lower


def test_what_few_parts_of_the_images_or_no_finite_number_tell_moves_no_plan():
    few = torch.tensor([[3.0, 20.0]] * 7)
    lower = few - torch.tensor([1.0, 0.0])
    assert Compared.of("distance", few, lower).error == inf
    assert not Compared.of("distance", few, lower).lower
    assert not compared([0.1] * 4, [nan] * 4).lower
    assert compared([nan, 0.1, 0.1, 0.1], [0.0] * 4).lower is False
    lost, whole = torch.full((2, 2), inf), torch.ones(2, 2)
    assert Compared.of("distance", lost.clone().index_fill_(1, torch.tensor([1]), 1), whole).lower


def plan(*kept: int) -> ChannelPlan:
    return ChannelPlan(architecture="tiny", groups=(Kept(site="mlp", axis="mlp_hidden", width=8, channels=(kept,)),))


def told_of(monkeypatch: pytest.MonkeyPatch, figures: list[Compared], other: ChannelPlan, ranked_by: str = "fisher"):
    """What is selected of two plans whose first look shows some figures, and the sentences about it."""
    plans = {"scores": plan(0, 1, 2), "search": other}
    group = SimpleNamespace(heads=2, width=4)
    monkeypatch.setattr(selecting, "by_group", lambda scores: scores)
    monkeypatch.setattr(selecting, "planned", lambda _, __, ___, scores: plans[scores])
    monkeypatch.setattr(selecting, "_first_look", lambda *_: figures)
    monkeypatch.setattr(selecting, "require_certificate", lambda *_: None)
    said: list[str] = []
    told: Any = SimpleNamespace(
        record=Record(), settings=SimpleNamespace(ranked_by=ranked_by), say=said.append, device=None
    )
    ranked = Ranked.model_construct(scores=cast(Any, "scores"), innovations={})
    searched = Searched.model_construct(scores=cast(Any, "search"), weights=None, steps=1200)
    anything: Any = MagicMock()
    budget: Any = SimpleNamespace(allowed=SimpleNamespace(opened=[group]))
    return select(cast(Context, told), anything, anything, budget, None, ranked, None, searched), said


@pytest.mark.parametrize(
    ("figures", "kept"),
    [
        ([BETTER], True),
        ([BETTER, BETTER], True),
        ([BETTER, WITHIN], False),
        ([WITHIN, BETTER], False),
        ([BETTER, WORSE], False),
        ([WITHIN], False),
    ],
)
def test_the_searchs_plan_is_kept_where_it_is_better_in_all_that_counts(monkeypatch, figures, kept):
    selected, said = told_of(monkeypatch, figures, plan(0, 1, 5))
    assert selected.searched == kept
    assert selected.plan == (plan(0, 1, 5) if kept else plan(0, 1, 2))
    shown = ", ".join(
        f"distance {figure.scores:.4g} to {figure.search:.4g} (± {figure.error:.2g})" for figure in figures
    )
    verdict = "kept" if kept else "not better by two standard errors, the scores' plan kept"
    assert said == [f"selection: 1,200 steps, 1 of 8 channels moved, {shown}, {verdict}"]


def test_a_plan_that_has_not_moved_is_the_scores_and_nothing_is_looked_at(monkeypatch):
    selected, said = told_of(monkeypatch, [BETTER], plan(0, 1, 2))
    assert not selected.searched
    assert said == ["selection: 1,200 steps, 0 of 8 channels moved, the scores' plan kept"]


def test_of_equal_scores_the_search_makes_the_plan(monkeypatch):
    selected, said = told_of(monkeypatch, [WORSE], plan(0, 1, 5), "equal")
    assert (selected.searched, selected.plan, said) == (True, plan(0, 1, 5), [])


@pytest.mark.parametrize(
    ("flags", "searching", "recovering"),
    [
        ({}, 16, 44),
        ({"recover_steps": 10}, 10, 0),
        ({"search_steps": 30, "epochs": 2}, 25, 25),
        ({"search_weight_lr": 0.0, "epochs": 2}, 50, 50),
        ({"recipe": "thorough"}, 2000, 2000),
        ({"recipe": "paper"}, 300, 300),
        ({"recipe": "paper", "epochs": 3}, 21, 75),
    ],
)
def test_a_search_that_trains_the_weights_takes_its_steps_out_of_those_of_the_recovery(flags, searching, recovering):
    config = load_config(flags.get("recipe"), None, flags)
    gates = 25 if config.search_split == 1 else 7
    parts = cast(Parts, SimpleNamespace(gates=range(gates), training=range(25)))
    steps = search_steps(config, parts)
    assert steps == searching
    assert recovery_steps(config, parts, steps if config.searches_jointly else 0) == recovering
    assert recovery_steps(config, parts) == recovering + (steps if config.searches_jointly else 0)
