"""The channels of a stream may stand in any order, and MLPs that keep the first of them need no gather."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

from kcrprune.errors import PlanMismatchError
from kcrprune.families import FeatureTap, contract_of, groups_of, streams_of
from kcrprune.measure.macs import count_macs
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.arranged import features_of
from kcrprune.surgery.gated import harden_
from kcrprune.surgery.narrow import cut_, expand_, full_plan
from kcrprune.surgery.refit import refit_
from tests.tiny import TINY, Tiny, cost_of, gated, nested_plan, relative_error

KNOWN = [tiny for tiny in TINY if tiny.label not in ("swinv2", "eva02", "eva02_scaled", "dinov3")]
BOTH = [TINY[1], TINY[6]]  # distilled, and a Swin whose windows are padded
each_known = pytest.mark.parametrize("tiny", KNOWN, ids=lambda tiny: tiny.label)
each_kind = pytest.mark.parametrize("tiny", BOTH, ids=lambda tiny: tiny.label)


def cut(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    return cut_(copy.deepcopy(model), plan)


@each_known
@torch.no_grad()
def test_a_network_in_another_order_of_its_streams_is_the_same(tiny: Tiny):
    model, images = tiny.model().double(), tiny.images().double()
    orders = nested_plan(model, "tiny", 0).stream
    assert orders
    plan = full_plan(model, "tiny").model_copy(update={"stream": orders})
    other = cut(model, plan)
    assert relative_error(other(images), model(images)) <= 1e-13
    assert all(not torch.equal(a, b) for a, b in zip(_norms(other), _norms(model), strict=True))
    with FeatureTap(other) as theirs, FeatureTap(model) as own:
        for network in (other, model):
            network(images)
        assert relative_error(theirs.take(), own.take()[:, features_of(model, groups_of(model), plan)]) <= 1e-13
    back = expand_(tiny.model(1).double(), other, plan).state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def _norms(model: nn.Module) -> list[torch.Tensor]:
    return [cast(torch.Tensor, m.weight) for n, m in model.named_modules() if n.endswith(("norm1", "norm2"))]


@each_known
@torch.no_grad()
def test_keeping_the_first_channels_is_masking_the_others(tiny: Tiny):
    model, images = tiny.model().double(), tiny.images().double()
    plan = nested_plan(model, "tiny", 6)
    pruned, masked = cut(model, plan), copy.deepcopy(model)
    harden_(gated(masked), plan)
    assert relative_error(pruned(images), masked(images)) <= 1e-10
    assert pruned.state_dict().keys() <= model.state_dict().keys(), "no index is left"
    assert relative_error(expand_(tiny.model(1).double(), pruned, plan)(images), pruned(images)) <= 1e-10


def test_predicted_macs_are_counted_where_channels_come_first(tiny_vit: Tiny):
    model = tiny_vit.model()
    plan = nested_plan(model, "tiny", 6)
    assert cost_of(model, tiny_vit).predicted(plan) == count_macs(cut(model, plan), tiny_vit.input_size)


@each_kind
@torch.no_grad()
def test_a_refit_ends_where_that_of_gathered_channels_does(tiny: Tiny):
    model, images = tiny.model().double(), [tiny.images(4, seed).double() for seed in range(2)]
    plan, groups = nested_plan(model, "tiny", 6), contract_of(model, tiny.input_size).groups
    gathered = plan.model_copy(update={"stream": None})
    first, other = (refit_(cut(model, each), model, groups, each, images) for each in (plan, gathered))
    assert relative_error(first(images[0]), other(images[0])) <= 1e-6
    assert relative_error(other(images[0]), cut(model, gathered)(images[0])) > 1e-2, "something was refitted"


def test_a_network_with_a_tensor_that_nobody_knows_has_no_streams(tiny_vit: Tiny):
    model: Any = tiny_vit.model()
    assert len(streams_of(model)) == 1
    model.blocks[1].adapter = nn.Linear(24, 24)
    assert streams_of(model) == ()
    backbone: Any = tiny_vit.model()
    backbone.reset_classifier(0)
    assert streams_of(backbone) == (), "its stream is what it gives"


def test_an_order_that_is_not_the_networks_is_refused_and_nothing_is_cut(tiny_vit: Tiny):
    model = tiny_vit.model()
    plan = nested_plan(model, "tiny", 6)
    assert plan.stream
    before = copy.deepcopy(model.state_dict())
    wrong = {
        r"streams of \[24, 24\] channels; this network has \[24\]": plan.stream * 2,
        "keeps others than the stream's first channels": (plan.stream[0][::-1],),
    }
    for message, orders in wrong.items():
        with pytest.raises(PlanMismatchError, match=message):
            cut_(model, plan.model_copy(update={"stream": orders}))
    with pytest.raises(ValueError, match="names each channel once"):
        ChannelPlan(architecture=None, groups=(), stream=((0, 0),))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
