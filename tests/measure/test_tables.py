import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcrprune.measure import tables


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9876, "9,876"), (33_210, "33.21 k"), (22_050_664, "22.05 M"), (4.6e9, "4.60 G")]
)
def test_quantities_have_a_prefix(number, text):
    assert tables.count(number) == text


@given(st.floats(0, 10**6))
def test_durations_read_back(seconds):
    units = {"h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"([\d.]+) (h|min|s)", tables.duration(seconds))
    read = sum(float(value) * units[unit] for value, unit in parts)
    assert abs(read - seconds) <= (0.051 if seconds < 59.95 else 0.5 if seconds < 3599.5 else 60)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_written_so(seconds, text):
    assert tables.duration(seconds) == text


def test_figures_have_four_digits_and_times_one():
    assert [tables.figure(number) for number in (0.123456, 1234.56, 1e-7, 0)] == ["0.1235", "1235", "1e-07", "0"]
    assert tables.milliseconds(1.25) in ("1.2 ms", "1.3 ms")
    assert tables.percent(0.12345) == "12.35 %"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        (" a \n b ", "a b"),
        ("\x1b[31m", r"\\x1b\[31m"),
        ("plain", "plain"),
    ],
)
def test_markdown_reads_text_as_text(text, escaped):
    assert tables.escaped(text) == escaped


def test_a_table_is_written_with_its_first_column_to_the_left():
    table = tables.Table("Title", ("", "a", "b"), (("x", "1", "2"), ("y", "3", "4")))
    assert tables.markdown(table) == "## Title\n\n|  | a | b |\n|:--|--:|--:|\n| x | 1 | 2 |\n| y | 3 | 4 |"
