"""Values of settings as people write them: what each means, and what is answered to what means nothing."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from kcrprune.plan import AXES
from kcrprune.spelling import MOST, Latency, NonNegativeInt, PositiveInt, RoundTo, Share


def read(kind: Any, written: Any) -> Any:
    return TypeAdapter(kind).validate_python(written)


def refusal(kind: Any, written: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        read(kind, written)
    return refused.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("written", "share"), [("70%", 0.7), (" 70 % ", 0.7), ("0.7", 0.7), ("100%", 1.0), (1, 1.0), ("1e-3", 0.001)]
)
def test_a_share_is_a_part_of_one_or_of_a_hundred(written, share):
    assert read(Share, written) == pytest.approx(share)


@pytest.mark.parametrize("written", ["%", "x%", "", "seventy", "0,7"])
def test_what_is_no_number_is_told_how_a_share_is_written(written):
    assert "it is written as a share, such as 0.7 or 70%" in refusal(Share, written)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("70%%", "unable to parse"),
        ("70 % of it", "unable to parse"),
        (0, "greater than 0"),
        ("0%", "greater than 0"),
        ("100.1%", "less than or equal to 1"),
        (None, "valid number"),
    ],
)
def test_a_share_is_above_nothing_and_at_most_all(written, reason):
    assert reason in refusal(Share, written)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        (None, None),
        ("5ms", "5ms"),
        (" 05.0 ms ", "5ms"),
        ("1e3ms", "1000ms"),
        ("0.0001ms", "0.0001ms"),
        ("12.3456789012345ms", "12.3456789012ms"),
        (0.5, 0.5),
        ("50%", 0.5),
        ("0.999", 0.999),
    ],
)
def test_a_time_is_milliseconds_or_a_share_of_the_dense_time(written, means):
    assert read(Latency, written) == means


@pytest.mark.parametrize(
    "written",
    ["0ms", "-5ms", "nanms", "infms", "ms", "5 ms of it", "5msms", "5s", "fast", 0, "0", 1, 1.0, "100%", -0.5, True],
)
def test_what_is_no_time_is_told_how_one_is_written(written):
    assert "below 1, such as 0.7 or 70%, or as 5ms" in refusal(Latency, written)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        (16, 16),
        ("16", 16),
        ("heads=2", {"heads": 2}),
        (" mlp_hidden = 64 , heads = 2 ", {"mlp_hidden": 64, "heads": 2}),
        ({"attn_value": "4"}, {"attn_value": 4}),
        ({}, {}),
    ],
)
def test_widths_are_one_for_all_axes_or_one_for_each_that_is_named(written, means):
    assert read(RoundTo, written) == means


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("depth=8", f"there is no axis 'depth', these are: {', '.join(AXES)}"),
        ("heads=2,=8", "there is no axis ''"),
        ("heads", "unable to parse"),
        ("heads=", "heads = '' is no width"),
        ("heads=0", "heads = '0' is no width"),
        ("heads=-8", "heads = '-8' is no width"),
        ("heads=8=8", "heads = '8=8' is no width"),
        ({"heads": True}, "heads = True is no width"),
        ({"heads": None}, "heads = None is no width"),
        (0, "greater than 0"),
    ],
)
def test_what_is_no_width_of_an_axis_is_named(written, reason):
    assert reason in refusal(RoundTo, written)


@pytest.mark.parametrize(("kind", "least"), [(PositiveInt, 1), (NonNegativeInt, 0)])
def test_counts_are_what_libraries_can_index(kind, least):
    assert (read(kind, least), read(kind, MOST)) == (least, 2**31 - 1)
    assert "greater than" in refusal(kind, least - 1)
    assert "less than or equal to 2147483647" in refusal(kind, MOST + 1)
    assert "less than or equal to 2147483647" in refusal(RoundTo, MOST + 1)
