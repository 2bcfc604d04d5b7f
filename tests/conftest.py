"""Tiny models of every family, and plans that cut every axis of them."""

import os
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kcrprune.families import build, contract_of, groups_of
from kcrprune.plan import Architecture, BlockPlan, ChannelPlan, Kept

# One thread: a second brings tiny networks nothing, and where the cores are shared it makes them ten times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too


@dataclass(frozen=True)
class Tiny:
    """One tiny network: how to build it and what it eats."""

    label: str
    architecture: Architecture
    input_size: tuple[int, int, int]

    def model(self, seed: int = 0) -> nn.Module:
        """A fresh copy with weights that make every part matter (timm's own start is nearly the identity)."""
        torch.manual_seed(seed)
        model = build(self.architecture)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim < 2 or "embed" in name or "token" in name or "table" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        return model

    def images(self, count: int = 2, seed: int = 0) -> torch.Tensor:
        """Random inputs (count, C, H, W)."""
        return torch.randn(count, *self.input_size, generator=torch.Generator().manual_seed(seed))


def _vit(label: str, name: str, **arguments: object) -> Tiny:
    size = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | arguments
    return Tiny(label, Architecture.model_validate({"family": "vit", "name": name, "arguments": size}), (3, 32, 32))


def _swin(label: str, **arguments: object) -> Tiny:
    size = {"img_size": 56, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "num_classes": 5} | arguments
    name = "swin_tiny_patch4_window7_224"
    return Tiny(label, Architecture.model_validate({"family": "swin", "name": name, "arguments": size}), (3, 56, 56))


TINY = (
    _vit("vit", "vit_tiny_patch16_224"),
    _vit("deit_distilled", "deit_tiny_distilled_patch16_224"),
    _vit("deit3", "deit3_small_patch16_224"),
    _vit("dinov2_reg4", "vit_small_patch14_reg4_dinov2", img_size=28),
    _vit("qk_norm", "vit_tiny_patch16_224", qk_norm=True),
    _swin("swin"),
    _swin("swin_padded", window_size=5),  # 14 and 7 tokens a side are no multiples of 5: windows are padded
)
TINY = tuple(Tiny(tiny.label, tiny.architecture, (3, 28, 28)) if tiny.label == "dinov2_reg4" else tiny for tiny in TINY)


@pytest.fixture(params=TINY, ids=lambda tiny: tiny.label)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each tiny network in turn."""
    return request.param


@pytest.fixture
def tiny_vit() -> Tiny:
    """The plain tiny ViT, for tests that need only one."""
    return TINY[0]


def random_plan(model: nn.Module, name: str, seed: int) -> ChannelPlan:
    """A plan that cuts each axis that each block allows, at random; some axes stay whole."""
    draw = random.Random(seed)
    return ChannelPlan(architecture=name, blocks=tuple(_random_block(site, draw) for site in sites(model)))


def _random_block(site: BlockSite, draw: random.Random) -> BlockPlan:
    def kept(axis: str, width: int, count: int | None = None) -> Kept:
        if axis not in site.axes or (count is None and draw.random() < 0.3):
            return Kept.all_of(width)
        chosen = draw.sample(range(width), count or draw.randint(1, width))
        return Kept(width=width, indices=tuple(sorted(chosen)))

    heads = kept("heads", site.heads)
    query, value = draw.randint(1, site.head_dim), draw.randint(1, site.head_dim)
    per_head = range(len(heads.indices))
    return BlockPlan(
        site=site.name,
        mlp_io=kept("mlp_io", site.width),
        mlp_hidden=kept("mlp_hidden", site.hidden),
        heads=heads,
        attn_query=tuple(kept("attn_query", site.head_dim, query) for _ in per_head),
        attn_value=tuple(kept("attn_value", site.head_dim, value) for _ in per_head),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float(((actual - expected).norm() / expected.norm()).detach())
