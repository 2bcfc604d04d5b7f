"""The certificate is 0 on every group of every family, and not 0 on rules that are wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.errors import UnsupportedModelError
from kcrprune.families import Group, Key, groups_of
from kcrprune.method.budget import kept_of
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.certificate import certificate, require_certificate
from tests.tiny import TINY, Tiny, nested_plan, random_plan

BY_LABEL = {tiny.label: tiny for tiny in TINY}


@pytest.mark.parametrize("seed", [0, 1])
def test_closed_channels_are_not_seen_whatever_they_hold(tiny: Tiny, seed: int):
    model = tiny.model(seed)
    found = certificate(model, groups_of(model), random_plan(model, "tiny", seed), tiny.images())
    wanted = [group.key for group in groups_of(model) if not group.wide and group.axis != "heads"]
    assert found == dict.fromkeys(wanted, 0.0)


def wrong(groups: tuple[Group, ...], key: Key, **claims: object) -> list[Group]:
    return [replace(group, **claims) if group.key == key else group for group in groups]  # type: ignore[arg-type]


def test_a_norm_that_is_not_told_of_is_found():
    tiny = BY_LABEL["eva02_scaled"]
    model = tiny.model()
    groups, plan = groups_of(model), random_plan(model, "tiny", 2)
    key: Key = ("blocks.0.mlp", "mlp_hidden")
    hidden = next(group for group in groups if group.key == key)
    claimed = wrong(groups, key, norm=None, writers=hidden.writers[:2])
    assert certificate(model, claimed, plan, tiny.images())[key] > 1e-3
    with pytest.raises(
        UnsupportedModelError, match=r"mlp_hidden of 'blocks.0.mlp' \(SwiGLU\) is not what its rule says"
    ):
        require_certificate(model, claimed, plan, tiny.images())


@pytest.mark.parametrize("label", ["vit", "swinv2", "dinov3"])
def test_keys_that_lie_elsewhere_are_found(label: str):
    """q and k have no reader but each other: a rule that takes v for k, or channels that are off by one."""
    tiny = BY_LABEL[label]
    model = tiny.model()
    groups = groups_of(model)
    plan = half_of_the_queries(groups)
    query, value = (next(group for group in groups if group.axis == axis) for axis in ("attn_query", "attn_value"))
    half = len(query.writers) // 2
    taken = wrong(groups, query.key, writers=(*query.writers[:half], *value.writers[:half]))
    assert certificate(model, taken, plan, tiny.images())[query.key] > 1e-3
    q, *rest = query.writers
    shifted = replace(q, start=q.start - 1)
    assert certificate(model, wrong(groups, query.key, writers=(shifted, *rest)), plan, tiny.images())[query.key] > 1e-3


def test_a_branch_that_leaves_more_than_its_bias_cannot_go(tiny_vit: Tiny):
    model: Any = tiny_vit.model()
    plan = random_plan(model, "tiny", 0, going=1)
    assert plan.gone == {f"blocks.{index}.{branch}" for index in range(2) for branch in ("attn", "mlp")}
    require_certificate(model, groups_of(model), plan, tiny_vit.images())
    model.blocks[1].attn.proj_drop = torch.nn.Tanh()  # behind what closed channels reach
    with pytest.raises(UnsupportedModelError, match=r"'blocks.1.attn' \(Attention\) gives more than the bias"):
        require_certificate(model, groups_of(model), plan, tiny_vit.images())


def test_a_stream_that_is_mixed_where_nobody_knows_is_found(tiny_vit: Tiny):
    model: Any = tiny_vit.model().eval()
    groups, plan = groups_of(model), nested_plan(model, "tiny", 4)
    require_certificate(model, groups, plan, tiny_vit.images())
    model.pos_drop = Mixing()
    with pytest.raises(UnsupportedModelError, match=r"the stream of this VisionTransformer .* leave mlp_io out of"):
        require_certificate(model, groups, plan, tiny_vit.images())


class Mixing(nn.Module):
    """Has no tensor, and takes a channel's neighbour for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.roll(1, -1)


def half_of_the_queries(groups: tuple[Group, ...]) -> ChannelPlan:
    """Every other unit of q and k goes, and nothing else."""
    entries = [
        kept_of(
            group, range(group.heads), [range(0, group.units, 2 if group.axis == "attn_query" else 1)] * group.heads
        )
        for group in groups
        if group.axis != "heads"
    ]
    return ChannelPlan(architecture="tiny", groups=tuple(entries))


def test_the_network_itself_stays_as_it_was(tiny_vit: Tiny):
    model = tiny_vit.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certificate(model, groups_of(model), random_plan(model, "tiny", 0), tiny_vit.images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
