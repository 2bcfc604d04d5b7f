from math import inf
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kcrprune.errors import DivergedError
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import Context, Record
from kcrprune.run.cutting import Cut, choose


def candidate(distance: float) -> Cut:
    return Cut(plan=ChannelPlan(architecture="tiny", groups=()), weights={}, distance=distance)


@pytest.fixture
def context() -> Context:
    told: Any = SimpleNamespace(record=Record(), settings=SimpleNamespace(ranked_by="fisher"), say=lambda *_: None)
    return cast(Context, told)


def test_a_candidate_that_answers_nothing_finite_is_not_chosen(context: Context):
    good, bad = candidate(2.0), candidate(inf)
    assert choose(context, bad, good) is good
    assert choose(context, good, bad) is good
    assert choose(context, candidate(3.0), good) is good
    assert context.record.decisions["plans"]["chosen"] == "scores"


def test_where_none_answers_finite_numbers_the_run_ends_with_the_way_out(context: Context):
    with pytest.raises(DivergedError, match=r"cut by its scores answers what are no finite .* higher --refit-ridge"):
        choose(context, None, candidate(inf))
