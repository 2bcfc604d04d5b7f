"""Tables of times: what lies between two that were measured, and files that are none."""

import itertools
import json
from pathlib import Path

import pytest

from kcrprune.errors import ConfigError
from kcrprune.measure.times import BranchTimes, TimeTable, read_times

GRID = BranchTimes(
    axes={"attn_query": (8, 16, 32), "attn_value": (4, 8)},
    ms=tuple(2.0 + 3 * query + 5 * value + 0.5 * query * value for query in (8, 16, 32) for value in (4, 8)),
)
TABLE = TimeTable(machine="x", threads=2, batch=3, rounds=7, dense_ms=9.5, branches={"an attention": GRID})


@pytest.mark.parametrize(("query", "value"), [(8, 4), (32, 8), (12, 4), (20, 6), (31, 7)])
def test_a_surface_that_is_linear_in_each_width_is_met_everywhere(query: int, value: int):
    expected = 2.0 + 3 * query + 5 * value + 0.5 * query * value
    assert GRID.at({"attn_query": query, "attn_value": value}) == pytest.approx(expected)
    assert GRID.at({"attn_query": 1, "attn_value": value}) == GRID.at({"attn_query": 8, "attn_value": value})


def test_times_never_fall_with_a_width_whatever_the_clock_said():
    uneven = BranchTimes(axes={"mlp_io": (1, 2, 4), "mlp_hidden": (2, 4, 8)}, ms=(5, 2, 9, 1, 4, 3, 6, 8, 7))
    widths = list(itertools.product(range(1, 5), range(1, 9)))
    times = {(io, hidden): uneven.at({"mlp_io": io, "mlp_hidden": hidden}) for io, hidden in widths}
    for (io, hidden), time in times.items():
        assert time <= min(times.get((io + 1, hidden), 99), times.get((io, hidden + 1), 99))
    assert times[4, 8] == (7 + 9) / 2
    assert times[1, 8] == times[2, 8] == (3 + 9) / 2, "the clock said 9 for less, and 3"


def test_a_table_survives_its_file(tmp_path: Path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(TABLE.model_dump(mode="json")))
    assert read_times(path) == TABLE


def changed(**fields: object) -> str:
    return json.dumps(TABLE.model_dump(mode="json") | fields)


def of_branch(**fields: object) -> str:
    return changed(branches={"x": GRID.model_dump(mode="json") | fields})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (changed()[:-9], "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("[1]", "the file: "),
        (changed(format=2), "format: "),
        (changed(dense_ms=-1), "dense_ms: "),
        (changed(dense_ms="Infinity"), "dense_ms: "),
        (changed(stranger=1), "stranger: "),
        (of_branch(ms=[1.0]), "1 times are not those of all combinations"),
        (of_branch(axes={"attn_query": [16, 8, 32], "attn_value": [4, 8]}), "widths must ascend"),
        (of_branch(axes={}), "axes"),
        (of_branch(axes={"depth": [1]}), "depth"),
        ("x" * (2**24 + 1), "larger than any table"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(text: str, reason: str, tmp_path: Path):
    path = tmp_path / "strange.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"latency_table .*strange\.json") as refused:
        read_times(path)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["absent.json", ".", "a\0b"])
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_times(tmp_path / name)
