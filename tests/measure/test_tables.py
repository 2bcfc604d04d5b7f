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
