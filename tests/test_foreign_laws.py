"""The laws on modules of other libraries, which keep their own forward: masking is cutting, MACs are those counted."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.families import Feed, Given, Group, Slot, contract_of
from kcrprune.families.given import Use
from kcrprune.method.cost import MacCost
from kcrprune.run.given import given_groups, part_macs
from kcrprune.surgery.certificate import certificate, unproven
from kcrprune.surgery.gated import add_gates_, harden_
from kcrprune.surgery.narrow import cut_
from tests.foreign_networks import FOREIGN, OWN_RULES, OwnAttention, OwnMlp, foreign, images
from tests.tiny import dense_macs, random_plan

FEED = Feed(images(), 4)


def given(name: str) -> Given:
    model = foreign(name)
    return Given(model, Use(), given_groups(model, "", OWN_RULES if name == "own" else {}))


@pytest.fixture(params=FOREIGN)
def network(request: pytest.FixtureRequest) -> Given:
    return given(request.param)


def test_masking_is_cutting_and_both_cost_what_is_predicted(network: Given):
    plan = random_plan(network, "", seed=1)
    cost = MacCost.of(network, contract_of(network, FEED), part_macs(network, FEED))
    with torch.no_grad():
        masked, cut = copy.deepcopy(network).double(), cut_(copy.deepcopy(network).double(), plan)
        harden_(add_gates_(masked, network.groups, [group for group in network.groups if not group.whole]), plan)
        feed = Feed(FEED.batch.double(), 4)
        networks: Any = (copy.deepcopy(network).double(), masked, cut)
        dense, expected, answer = (each.outputs(feed) for each in networks)
    for name, value in expected.items():
        assert float((answer[name] - value).norm() / value.norm()) < 1e-10
    assert any(not torch.allclose(dense[name], value) for name, value in expected.items())
    small: Any = cut_(copy.deepcopy(network), plan)
    assert part_macs(small, FEED) == cost.predicted(plan) < cost.dense
    new = small.inside.state_dict().keys() ^ network.inside.state_dict().keys()
    gone = [name for group in network.groups if group.site in plan.gone for name in (group.site, group.stream)]
    new = {name for name in new if not name.startswith(tuple(f"{branch}." for branch in gone))}
    assert all(name.endswith(".index") for name in new)  # of mlp_io, where channels of the stream are gathered


def test_closed_channels_are_not_seen(network: Given):
    found = certificate(network, network.groups, random_plan(network, "", seed=2), FEED)
    assert found
    assert set(found.values()) == {0.0}


def test_two_counters_agree(tiny_vit):
    model = tiny_vit.model()
    assert part_macs(Given(model, Use()), Feed(tiny_vit.images(1), 1)) == dense_macs(tiny_vit.label)


def test_a_class_that_changed_its_forward_is_found_and_only_that_one(monkeypatch):
    network = given("own")
    assert unproven(network, network.groups, FEED) == {}

    def by_width(self, x):  # divides the stream's width by its heads
        q, k, v = (part(x).view(*x.shape[:2], 3, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(OwnAttention, "forward", by_width)
    [(name, why)] = unproven(network, network.groups, FEED).items()
    assert name.endswith(":OwnAttention")
    assert "does not run on what a cut leaves" in why


def test_a_norm_inside_that_no_rule_tells_of_is_found():
    network = given("own")
    body: Any = network.inside.body
    body["first"].down = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24))
    network.groups = given_groups(network.inside, "", {OwnMlp: _behind_a_norm})
    assert "noise" in next(iter(unproven(network, network.groups, FEED).values()))


def _behind_a_norm(site: str, module: Any) -> tuple[Group, ...]:
    if not isinstance(module.down, nn.Sequential):
        return ()
    written = tuple(Slot(f"{site}.{name}", 0) for name in ("up", "gate"))
    return (Group(site, "mlp_hidden", 1, 32, written, (Slot(f"{site}.down.1", 1),)),)
