import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kcrprune.measure import tables
from kcrprune.measure.report import (
    Accuracy,
    BlockWidths,
    Comparison,
    Inspection,
    KernelFigures,
    ModelReport,
    StageTime,
    block_widths,
    summary,
    tables_of,
    to_markdown,
)
from kcrprune.plan import AXES, Preprocessing
from kcrprune.surgery.pruned import full_plan
from tests.conftest import random_plan

KERNEL = KernelFigures(
    kc=0.108, h=12, tnn=0.9, kc_normalised=0.05, tnn_relative=0.2, effective_rank=9.5, rank=19, images=2048
)
BLOCK = BlockWidths(site="blocks.0", dense={"mlp_hidden": 96, "heads": 2}, kept={"mlp_hidden": 40, "heads": 2})


def report(**changes):
    known = {
        "source": "in/vit.pth",
        "layout": "timm",
        "state": "dense",
        "architecture": "vit_small_patch16_224",
        "family": "vit",
        "input_size": (3, 224, 224),
        "parameters": 22_050_664,
        "macs": 4_598_882_304,
        "dense_macs": 4_598_882_304,
        "file_bytes": 88_270_000,
        "kernel": KERNEL,
        "accuracy": Accuracy(images=10_000, top1=0.8465, loss=0.5),
        "notes": ("no data: images were generated",),
    }
    return ModelReport.model_validate(known | changes)


AFTER = report(
    source="run/model.safetensors",
    state="pruned",
    macs=3_219_217_613,
    parameters=15_000_000,
    blocks=(BLOCK,),
    accuracy=Accuracy(images=10_000, top1=0.8425, agreement=0.95),
)
COMPARISON = Comparison(
    before=report(),
    after=AFTER,
    stages=(StageTime(stage="search", seconds=75), StageTime(stage="cut", seconds=0.5)),
    settings={"target_flops": 0.7, "recipe": "default"},
)
INSPECTION = Inspection(
    source="in/vit.pth",
    layout="official DeiT",
    architecture="deit_tiny_patch16_224",
    family="vit",
    preprocessing=Preprocessing(input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    class_count=1000,
    parameters=5_717_416,
    macs=1_253_700_000,
    file_bytes=22_900_000,
    axes=("mlp_hidden",),
    floor={"default": 0.12, "paper": 0.444},
    notes=("the keys are timm's",),
    foreign_names=("argparse.Namespace",),
)


def cells(markdown, label):
    """The cells behind the first one of the row that `label` opens."""
    (row,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize("data", [report(), AFTER, COMPARISON, INSPECTION], ids=lambda data: type(data).__name__)
def test_json_brings_back_the_same_data(data):
    assert type(data).model_validate_json(data.model_dump_json()) == data


@pytest.mark.parametrize("data", [report(), COMPARISON, INSPECTION], ids=lambda data: type(data).__name__)
def test_an_unknown_field_is_refused(data):
    fields = json.loads(data.model_dump_json()) | {"flops": 1}
    with pytest.raises(ValidationError, match="flops"):
        type(data).model_validate(fields)


def test_a_block_cannot_keep_more_than_it_had():
    with pytest.raises(ValidationError, match="do not fit the dense widths"):
        BlockWidths(site="blocks.0", dense={"heads": 2}, kept={"heads": 3})
    with pytest.raises(ValidationError, match="do not fit the dense widths"):
        BlockWidths(site="blocks.0", dense={"heads": 2}, kept={"mlp_io": 1})


def test_the_widths_of_a_plan_are_those_of_its_blocks(tiny):
    model = tiny.model()
    plan = random_plan(model, tiny.architecture.name, seed=3)
    dense = block_widths(full_plan(model, tiny.architecture.name))
    cut = block_widths(plan)
    assert [block.site for block in cut] == [block.site for block in plan]
    assert all(set(block.dense) == set(AXES) for block in cut)
    assert [block.dense for block in cut] == [block.kept for block in dense]
    assert [block.kept for block in cut] == [block.widths for block in plan]


def test_a_run_shows_before_after_and_the_change():
    text = to_markdown(COMPARISON)
    assert text.startswith("# vit_small_patch16_224: cut to 0.700 of its MACs\n")
    assert cells(text, "parameters") == ["22.05 M", "15.00 M", "x 0.680"]
    assert cells(text, "MACs of one image") == ["4.60 G", "3.22 G", "x 0.700"]
    assert cells(text, "file size") == ["88.27 MB", "88.27 MB", "x 1.000"]
    assert cells(text, "top-1") == ["84.65 %", "84.25 %", "-0.40 points"]
    assert cells(text, "agreement with the dense network") == ["-", "95.00 %", ""]
    assert cells(text, "blocks.0") == ["40 of 96", "2"]
    assert cells(text, "search") == ["1 min 15 s"]
    assert cells(text, "all") == ["1 min 16 s"]
    assert '`target_flops = 0.7`, `recipe = "default"`' in text
    assert text.count("no data: images were generated") == 1


def test_what_nobody_measured_has_no_row():
    text = to_markdown(report(kernel=None, accuracy=None, dense_macs=None))
    assert not re.search("KC|TNN|top-1|loss|agreement|one call|share of", text)
    assert "change" not in text


def test_networks_stand_side_by_side():
    reports = [report(source=name) for name in ("a.pth", "b.pth", "c.onnx")]
    assert summary(reports).header == ("", "a.pth", "b.pth", "c.onnx")
    assert to_markdown(reports).startswith("# a.pth and b.pth and c.onnx\n")


def test_an_inspection_says_what_a_pickle_mentions():
    text = to_markdown(INSPECTION)
    assert cells(text, "floor of recipe paper") == ["0.444"]
    assert "argparse.Namespace" in text
    assert "- the keys are timm's" in text


@given(source=st.text(min_size=1), note=st.text(min_size=1))
def test_strange_names_break_no_table(source, note):
    text = to_markdown([report(source=source, notes=(note,)), AFTER])
    assert len([line for line in text.split("\n") if line.startswith("#")]) == 4  # title, two tables, notes
    rows = [line for line in text.split("\n") if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows[: len(tables_of([report(), AFTER])[0].rows)]}
    assert widths == {5}  # four columns


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
