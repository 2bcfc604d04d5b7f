"""What a graph says of itself: written as text, read back, and refused where it is damaged."""

import hashlib
import json
from typing import Any

import pytest

from kcrprune.errors import CheckpointError
from kcrprune.graphs.record import GraphRecord, metadata_of
from kcrprune.measure.report import block_widths
from kcrprune.plan import Architecture, ChannelPlan, Kept, Preprocessing, canonical_json
from kcrprune.version import __version__

PREPARED = Preprocessing(input_size=(3, 8, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
PLAN = ChannelPlan(
    architecture="vit", groups=(Kept(site="blocks.0.mlp", axis="mlp_hidden", width=4, channels=((0, 2),)),)
)


def metadata(**changes: Any) -> dict[str, str]:
    known: dict[str, Any] = {"plan": PLAN, "class_names": ("a", "b"), "parameters": 7, "macs": 0, "dense_macs": 9}
    return metadata_of(
        architecture=Architecture(family="vit", name="vit_x"),
        preprocessing=PREPARED,
        outputs="classes",
        **known | changes,
    )


def test_what_is_known_stands_as_text_or_json_behind_our_prefix():
    found = metadata()
    assert set(found) == {f"kcrprune.{name}" for name in GraphRecord.model_fields}
    assert found["kcrprune.version"] == __version__
    assert (found["kcrprune.architecture"], found["kcrprune.family"], found["kcrprune.outputs"]) == (
        "vit_x",
        "vit",
        "classes",
    )
    assert json.loads(found["kcrprune.class_names"]) == ["a", "b"]
    assert (found["kcrprune.macs"], found["kcrprune.dense_macs"]) == ("0", "9")
    text = canonical_json(PLAN.model_dump(mode="json"))
    assert found["kcrprune.plan_digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_what_was_written_is_read():
    record = GraphRecord.from_metadata(metadata() | {"somebody": "else", "kcrprune.of_tomorrow": "?"})
    assert record.preprocessing == PREPARED
    assert record.blocks == block_widths(PLAN)
    assert (record.class_names, record.parameters, record.macs, record.dense_macs) == (("a", "b"), 7, 0, 9)
    assert record.to_metadata() == metadata()


def test_what_is_not_known_has_no_key():
    found = metadata(plan=None, class_names=None, dense_macs=None)
    assert not {"plan_digest", "blocks", "class_names", "dense_macs"} & {key.removeprefix("kcrprune.") for key in found}
    assert GraphRecord.from_metadata({}) == GraphRecord()
    assert GraphRecord().to_metadata() == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outputs", "boxes"),
        ("macs", "-1"),
        ("macs", "1.5"),
        ("macs", str(2**63)),
        ("dense_macs", "0"),
        ("parameters", "many"),
        ("class_names", "a"),
        ("preprocessing", "{}"),
        ("blocks", "[1]"),
    ],
)
def test_a_damaged_value_is_named(key: str, value: str):
    with pytest.raises(CheckpointError, match=rf"^its metadata is damaged: kcrprune\.{key}: "):
        GraphRecord.from_metadata(metadata() | {f"kcrprune.{key}": value})
