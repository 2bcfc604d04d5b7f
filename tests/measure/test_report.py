import json

import pytest
from pydantic import ValidationError

from kcrprune.measure.report import BlockWidths, block_widths
from kcrprune.method.cost import plan_widths
from kcrprune.plan import AXES
from kcrprune.surgery.narrow import full_plan
from tests.measure.examples import AFTER, COMPARISON, INSPECTION, report
from tests.tiny import random_plan


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
    assert [block.site for block in cut] == list(plan.blocks)
    of_transformers = set(AXES) - {"conv_hidden"}
    assert all(set(block.dense) | {"mlp_io"} == of_transformers for block in cut)  # which Swin V2 does not have
    assert [block.dense for block in cut] == [block.kept for block in dense]
    widths = plan_widths(plan)
    for block in cut:
        assert block.kept == {
            axis: width for (site, axis), width in widths.items() if site.startswith(f"{block.site}.")
        }
