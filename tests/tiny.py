"""Tiny models of every family, and plans that cut every axis of them."""

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.families import Group, build, contract_of, groups_of, kept_widths, streams_of
from kcrprune.measure.macs import count_macs
from kcrprune.method.budget import kept_of
from kcrprune.method.cost import MacCost
from kcrprune.method.gates import Gates
from kcrprune.plan import AXES, PER_HEAD, Architecture, Axis, ChannelPlan, Kept
from kcrprune.surgery.gated import add_gates_
from kcrprune.surgery.narrow import keep_all


@dataclass(frozen=True)
class Tiny:
    """One tiny network: how to build it and what it eats."""

    label: str
    architecture: Architecture
    input_size: tuple[int, int, int]

    @property
    def target(self) -> float:
        """A share of the MACs that a cut reaches: a hybrid's stem stays."""
        return 0.95 if self.label == "hybrid" else 0.8

    def model(self, seed: int = 0) -> nn.Module:
        """A fresh copy with weights that make every part matter (timm's own start is nearly the identity)."""
        model = copy.deepcopy(_built(self.architecture.model_dump_json(), seed))
        torch.manual_seed(seed)
        return model

    def images(self, count: int = 2, seed: int = 0) -> torch.Tensor:
        """Random inputs (count, C, H, W)."""
        drawn = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.input_size, generator=drawn, device="cpu").to(torch.get_default_device())


@cache
def _built(architecture: str, seed: int) -> nn.Module:
    """Built once a process: a copy takes half the time."""
    torch.manual_seed(seed)
    return shaken_(build(Architecture.model_validate_json(architecture)))


@torch.no_grad()
def shaken_(model: nn.Module) -> nn.Module:
    """Gives a network weights that make every part matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed" in name or "token" in name or "table" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return model


def _vit(label: str, name: str, **arguments: object) -> Tiny:
    size = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | arguments
    return _tiny(label, "vit", name, size)


def _swin(label: str, **arguments: object) -> Tiny:
    size = {"img_size": 56, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "num_classes": 5} | arguments
    return _tiny(label, "swin", "swin_tiny_patch4_window7_224", size)


def _eva(label: str, name: str, **arguments: object) -> Tiny:
    size = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | arguments
    return _tiny(label, "eva", name, size)


def _tiny(label: str, family: str, name: str, arguments: dict[str, object]) -> Tiny:
    architecture = Architecture.model_validate({"family": family, "name": name, "arguments": arguments})
    side = int(str(arguments["img_size"]))
    return Tiny(label, architecture, (3, side, side))


TINY = (
    _vit("vit", "vit_tiny_patch16_224"),
    _vit("deit_distilled", "deit_tiny_distilled_patch16_224"),
    _vit("deit3", "deit3_small_patch16_224"),
    _vit("dinov2_reg4", "vit_small_patch14_reg4_dinov2", img_size=28),
    _vit("qk_norm", "vit_tiny_patch16_224", qk_norm=True),
    _swin("swin"),
    _swin("swin_padded", window_size=5),  # 14 and 7 tokens a side are no multiples of 5: windows are padded
    _vit("hybrid", "vit_tiny_r_s16_p8_224", embed_dim=96),
    _tiny(
        "swinv2",
        "swinv2",
        "swinv2_tiny_window8_256",
        {"img_size": 32, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 4], "window_size": 3, "num_classes": 5},
    ),
    _eva("eva02", "eva02_tiny_patch14_336"),  # packed SwiGLU, rotary pairs of neighbours
    _eva("eva02_scaled", "eva02_base_patch14_448"),  # SwiGLU with a norm over the hidden units
    _eva("dinov3", "vit_small_patch16_dinov3", img_size=32, embed_dim=32),  # q, k and v apart, rotary halves
)


def random_plan(model: nn.Module, name: str, seed: int, going: float = 0.25) -> ChannelPlan:
    """A plan that cuts each axis that each block allows, at random; some axes stay whole.

    Of the branches that may go a share `going` goes.
    """
    draw, branches = random.Random(seed), random.Random(f"branches {seed}")
    groups = groups_of(model)
    gone = {site for site in dict.fromkeys(g.site for g in groups if g.constant) if branches.random() < going}
    heads = {group.site: list(range(group.width)) for group in groups if group.axis == "heads" and group.whole}
    entries = []
    for group in groups:
        if group.axis == "heads":
            continue
        if group.site in gone:
            entries.append(keep_all(group) if group.wide else nothing_of(group))
            continue
        kept_heads = heads.setdefault(group.site, _chosen(draw, group.heads))
        count = group.units if group.whole or draw.random() < 0.3 else draw.randint(1, group.units)
        units = [sorted(draw.sample(range(group.units), count)) for _ in kept_heads]
        entries.append(kept_of(group, kept_heads, units))
    return ChannelPlan(architecture=name, groups=tuple(entries))


def nothing_of(group: Group) -> Kept:
    """The entry of a group whose branch goes."""
    return kept_of(group, (), ()) if group.axis in PER_HEAD else kept_of(group, (0,), [()])


def nested_plan(model: nn.Module, name: str, seed: int, **options: Any) -> ChannelPlan:
    """Such a plan in which MLPs keep the first channels of their stream, in a random order of it."""
    draw, groups, plan = random.Random(seed), groups_of(model), random_plan(model, name, seed, **options)
    streams = streams_of(model, groups)
    orders = [draw.sample(range(stream.width), stream.width) for stream in streams]
    first = {g.key: order for stream, order in zip(streams, orders, strict=True) for g in groups if stream.holds(g)}
    kept = [
        entry.model_copy(update={"channels": (tuple(sorted(first[entry.key][: entry.kept_width])),)})
        if entry.key in first
        else entry
        for entry in plan.groups
    ]
    return ChannelPlan(architecture=name, groups=tuple(kept), stream=tuple(map(tuple, orders)) or None)


def _chosen(draw: random.Random, count: int) -> list[int]:
    return list(range(count)) if draw.random() < 0.3 else sorted(draw.sample(range(count), draw.randint(1, count)))


def open_groups(model: nn.Module, axes: Iterable[Axis] = AXES) -> list[Group]:
    """The groups of some axes that may be cut."""
    return [group for group in groups_of(model) if group.axis in axes and not group.whole]


def gated(model: nn.Module, axes: Iterable[Axis] = AXES, **options: Any) -> Gates:
    """Gates on every group of some axes of a model."""
    return add_gates_(model, groups_of(model), open_groups(model, axes), **options)


def cost_of(model: nn.Module, tiny: Tiny) -> MacCost:
    """The MACs of a tiny model as its cost."""
    return MacCost.of(model, contract_of(model, tiny.input_size), dense_macs(tiny.label))


@cache
def dense_macs(label: str) -> int:
    """Counted once a network: tracing takes a second."""
    tiny = next(tiny for tiny in TINY if tiny.label == label)
    return count_macs(tiny.model(), tiny.input_size)


@torch.no_grad()
def torch_macs(model: nn.Module, image: torch.Tensor) -> int:
    """By torch's own counter, in which one multiply-accumulate is two FLOPs."""
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, kept_widths(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float(((actual - expected).norm() / expected.norm()).detach())
