"""A branch that stands alone computes at other widths what it computes in the network that is cut to them."""

import random
from typing import cast

import pytest
import torch
from torch import Tensor

from kcrprune.families import contract_of
from kcrprune.method.budget import kept_of
from kcrprune.method.cost import dense_widths
from kcrprune.plan import PER_HEAD, ChannelPlan
from kcrprune.surgery.branches import branches_of
from kcrprune.surgery.narrow import cut_
from tests.tiny import TINY, Tiny


@pytest.mark.parametrize("tiny", [TINY[i] for i in (1, 6, 7, 10, 11)], ids=lambda tiny: tiny.label)
@torch.no_grad()
def test_a_branch_at_other_widths_is_that_of_the_cut_network(tiny: Tiny):
    draw, dense, images = random.Random(0), tiny.model(), tiny.images(2)
    contract = contract_of(dense, tiny.input_size)
    kinds, branches = branches_of(dense, contract.sites, images)
    assert kinds.keys() == contract.sites.keys()
    widths = dense_widths(contract.groups)
    for group in contract.groups:
        if not group.whole:
            widths[group.key] = draw.randint(1, group.units) * group.span
    kept = []
    for group in contract.groups:
        if group.axis != "heads":
            heads = range(widths[group.site, "heads"] if group.axis in PER_HEAD else group.heads)
            kept.append(kept_of(group, heads, [range(widths[group.key] // group.span)] * len(heads)))
    cut = cut_(tiny.model(), ChannelPlan(architecture=None, groups=tuple(kept)))
    for branch in branches.values():
        site = branch.groups[0].site
        expected = cut.get_submodule(site)(*branch.args, **branch.keywords)
        assert torch.equal(cast(Tensor, branch.at(widths)()), expected), site
        assert branch.module is dense.get_submodule(site)
    same = cut_(tiny.model(), ChannelPlan(architecture=None, groups=tuple(kept)))(images)
    assert torch.equal(cut(images), same)


def test_branches_are_alike_where_class_inputs_and_widths_are():
    swin = TINY[5]
    model = swin.model()
    kinds, branches = branches_of(model, contract_of(model, swin.input_size).sites, swin.images(1))
    first, shifted, later = (kinds[f"layers.{name}.attn"] for name in ("0.blocks.0", "0.blocks.1", "1.blocks.0"))
    assert len({first, shifted, later}) == 3, "a mask, and other widths"
    assert kinds["layers.0.blocks.0.mlp"] == kinds["layers.0.blocks.1.mlp"]
    assert set(kinds.values()) == branches.keys()
