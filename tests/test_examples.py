"""The examples of the docs run, small."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


@pytest.mark.parametrize("name", ["huggingface_classifier", "clip_tower", "segmenter", "detector"])
def test_an_example_runs_and_reaches_its_budget(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["run"](steps=1, count=2 if name == "detector" else 64)
    [share] = [value for label, value in figures.items() if label.startswith("share")]
    assert 0.5 < share <= 0.7
    assert all(value >= 0 for value in figures.values())
