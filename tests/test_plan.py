"""A plan is checked where it comes in, whoever wrote it; plans of format 1 become those of format 2."""

import json
import re

import pytest
from pydantic import ValidationError

from kcrprune.plan import AXES, Architecture, ChannelPlan, Kept, Preprocessing, block_of, canonical_json, sides

QUERY = {"site": "blocks.0.attn", "axis": "attn_query", "heads": 3, "width": 4, "kept_heads": [0, 2],
         "channels": [[0, 1], [1, 3]]}  # fmt: skip
VALUE = QUERY | {"axis": "attn_value", "channels": [[0], [2]]}
HIDDEN = {"site": "blocks.0.mlp", "axis": "mlp_hidden", "width": 6, "channels": [[1, 4, 5]]}
FULL = {"site": "blocks.1.mlp", "axis": "mlp_hidden", "width": 2, "channels": [[0, 1]]}


def plan(*groups, **further):
    return ChannelPlan.model_validate({"architecture": None, "groups": groups, **further})


def test_widths_blocks_and_wholeness_are_those_of_its_groups():
    found = plan(QUERY, VALUE, HIDDEN, FULL)
    assert [kept.kept_width for kept in found] == [2, 1, 3, 2]
    assert [kept.is_all for kept in found] == [False, False, False, True]
    assert not found.is_all
    assert plan(FULL).is_all
    assert {name: len(groups) for name, groups in found.blocks.items()} == {"blocks.0": 3, "blocks.1": 1}
    nothing = Kept.model_validate(HIDDEN | {"channels": [[]]})
    assert (nothing.kept_width, nothing.is_all) == (0, False)
    assert Kept.model_validate(QUERY | {"kept_heads": [], "channels": []}).kept_width == 0


def test_all_heads_that_keep_less_and_all_channels_of_fewer_heads_are_no_whole():
    every = [list(range(4))]
    assert Kept.model_validate(QUERY | {"kept_heads": [0, 1, 2], "channels": every * 3}).is_all
    assert not Kept.model_validate(QUERY | {"kept_heads": [0, 1], "channels": every * 2}).is_all
    assert not Kept.model_validate(QUERY | {"kept_heads": [0, 1, 2], "channels": [[0, 1, 2]] * 3}).is_all


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"channels": [[1, 0], [1, 3]]}, "attn_query of blocks.0.attn: kept channels must be ascending and below"),
        ({"channels": [[1, 1], [1, 3]]}, "must be ascending and below the width 4"),
        ({"channels": [[0, 4], [1, 3]]}, "must be ascending and below the width 4"),
        ({"channels": [[-1, 0], [1, 3]]}, "greater than or equal to 0"),
        ({"kept_heads": [2, 0]}, "kept heads must be ascending and below the width 3"),
        ({"kept_heads": [0, 3]}, "kept heads must be ascending and below the width 3"),
        ({"channels": [[0, 1]]}, "describes 1 heads, 2 are kept"),
        ({"channels": [[0, 1], [1]]}, "every head keeps the same number of channels"),
        ({"width": 0}, "greater than 0"),
        ({"width": 4.5}, "valid integer"),
        ({"axis": "depth"}, "axis"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_group_that_cannot_be_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValidationError, match=re.escape(reason)):
        plan(QUERY | change)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ((QUERY, QUERY), "a group is named twice"),
        ((QUERY, VALUE | {"kept_heads": [1, 2]}), "the groups of blocks.0.attn keep other heads"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(groups, reason):
    with pytest.raises(ValidationError, match=reason):
        plan(*groups)


def kept(width, *indices):
    return {"width": width, "indices": list(indices)}


OLD = {"site": "blocks.0", "heads": kept(3, 0, 2), "attn_query": [kept(4, 0, 1), kept(4, 1, 3)],
       "attn_value": [kept(4, 0), kept(4, 2)], "mlp_io": kept(5, 0, 3), "mlp_hidden": kept(6, 1, 4, 5)}  # fmt: skip


def test_a_plan_of_format_1_is_read_and_written_as_one_of_format_2():
    found = ChannelPlan.model_validate({"architecture": "vit", "blocks": [OLD]})
    inputs = {"site": "blocks.0.mlp", "axis": "mlp_io", "width": 5, "channels": [[0, 3]]}
    assert found == plan(QUERY, VALUE, inputs, HIDDEN, architecture="vit")
    assert ChannelPlan.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    "blocks",
    [
        "blocks",
        [7],
        [{}],
        [{**OLD, "heads": None}],
        [{**OLD, "attn_query": []}],
        [{key: value for key, value in OLD.items() if key != "mlp_io"}],
        [{**OLD, "mlp_hidden": kept(6, 5, 1)}],
    ],
)
def test_a_damaged_plan_of_format_1_is_refused_as_one(blocks):
    with pytest.raises(ValidationError):
        ChannelPlan.model_validate({"architecture": "vit", "blocks": blocks})


def test_the_block_of_a_site_is_what_is_around_it():
    assert block_of("blocks.0.mlp", "mlp_hidden") == "blocks.0"
    assert block_of("stages.1.blocks.0", "conv_hidden") == "stages.1.blocks.0"
    assert block_of("attn", "heads") == "attn"


def test_equal_data_has_one_text():
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,null]}'
    assert json.loads(canonical_json({"b": [1.5], "a": {"d": 0, "c": True}})) == {"a": {"c": True, "d": 0}, "b": [1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_a_plan_has_moved_by_the_channels_that_the_other_does_not_keep():
    before = plan(QUERY, VALUE, HIDDEN)
    assert before.moved_from(before) == 0
    other = plan(QUERY | {"channels": [[0, 2], [1, 3]]}, VALUE, HIDDEN | {"channels": [[0, 4, 5]]})
    assert (other.moved_from(before), before.moved_from(other)) == (2, 2)
    fewer = plan(QUERY, VALUE, HIDDEN | {"channels": [[4]]})
    assert (fewer.moved_from(before), before.moved_from(fewer)) == (0, 2)
    heads = plan(*(group | {"kept_heads": [1, 2]} for group in (QUERY, VALUE)), HIDDEN)
    assert heads.moved_from(before) == 3, "the same channels of another head are others"


def test_of_a_block_with_several_branches_of_a_kind_each_stands_alone():
    crowded = plan(FULL, FULL | {"site": "blocks.1.mlp2"}, HIDDEN, QUERY)
    assert {name: [kept.site for kept in entries] for name, entries in crowded.blocks.items()} == {
        "blocks.1.mlp": ["blocks.1.mlp"],
        "blocks.1.mlp2": ["blocks.1.mlp2"],
        "blocks.0": ["blocks.0.mlp", "blocks.0.attn"],
    }


def test_a_plan_is_data_in_order_with_orders_of_streams():
    found = plan(HIDDEN, QUERY)
    assert [kept.key for kept in found] == [("blocks.0.mlp", "mlp_hidden"), ("blocks.0.attn", "attn_query")]
    assert found.stream is None
    assert plan(HIDDEN, stream=[[1, 0]]).stream == ((1, 0),)
    assert Kept.model_validate(HIDDEN).heads == 1
    assert Kept.model_validate(HIDDEN).kept_heads == (0,)
    assert plan().is_all
    with pytest.raises(ValidationError, match="frozen"):
        found.architecture = "other"  # type: ignore[misc]
    assert len(set(AXES)) == len(AXES) == 6


@pytest.mark.parametrize(
    "data",
    [
        [HIDDEN],
        {"architecture": None, "groups": [HIDDEN], "blocks": [7]},
        {"architecture": 7, "blocks": [OLD]},
        {"architecture": None, "groups": HIDDEN},
        {"groups": [HIDDEN]},
    ],
)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(ValidationError):
        ChannelPlan.model_validate(data)


def test_blocks_of_format_1_may_be_a_tuple_and_name_no_network():
    assert ChannelPlan.model_validate({"blocks": (OLD,)}).architecture is None
    with pytest.raises(ValidationError, match="blocks: a list of blocks is wanted"):
        ChannelPlan.model_validate({"blocks": {"0": OLD}})
    with pytest.raises(ValidationError, match="blocks: KeyError 'site'"):
        ChannelPlan.model_validate({"blocks": [{}]})


def preprocessing(**changes):
    return Preprocessing.model_validate({"input_size": (3, 8, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (0.5,) * 2},
        {"std": (0.5,) * 4},
        {"input_size": (1, 8, 8)},
        {"input_size": (0, 8, 8), "mean": (), "std": ()},
        {"input_size": (3, 2049, 8)},
        {"input_size": (3, 8, 0)},
        {"input_size": (65, 8, 8), "mean": (0,) * 65, "std": (1,) * 65},
        {"std": (0.5, 0.5, 9e-7)},
        {"mean": (0.5, 0.5, float("inf"))},
        {"crop_pct": 0.049},
        {"crop_pct": 4.1},
        {"interpolation": "cubic"},
        {"crop_mode": "left"},
    ],
)
def test_how_an_image_becomes_an_input_is_bounded(changes):
    with pytest.raises(ValidationError):
        preprocessing(**changes)


def test_bounds_themselves_are_within():
    widest = preprocessing(input_size=(64, 2048, 1), mean=(0,) * 64, std=(1e-6,) * 64, crop_pct=0.05)
    assert widest.input_size == (64, 2048, 1)
    assert (preprocessing().crop_pct, preprocessing().crop_mode, preprocessing().interpolation) == (
        *(1.0, "center", "bicubic"),
    )
    assert sides(7) == (7, 7)
    assert sides((7, 8)) == (7, 8)
    assert Architecture(family="vit", name="x").arguments == {}
