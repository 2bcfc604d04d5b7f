"""The laws of the method for every branch class that the tiny networks of conftest have none of, once each."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models import crossvit, davit, edgenext, gcvit, hieradet_sam2, nest, volo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.errors import PlanMismatchError
from kcrprune.families import classifiers, contract_of, groups_of, kept_widths
from kcrprune.method.cost import MacCost
from kcrprune.surgery.certificate import require_certificate
from kcrprune.surgery.gated import harden_
from kcrprune.surgery.narrow import cut_, full_plan
from kcrprune.surgery.partial import walk
from kcrprune.surgery.refit import refit_
from tests.tiny import gated, random_plan, relative_error, shaken_

SIZES = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
UNSIZED = {name: size for name, size in SIZES.items() if name != "img_size"}
FOUR = {"embed_dims": (24,) * 4, "num_heads": (2,) * 4, "num_classes": 5}


def named(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **(SIZES | arguments))


class Gated(nn.Module):
    """A gate on what attention makes, as of GenLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 16, 16)
        self.attn = Attention(24, 2, qkv_bias=True, gated=True, scale_norm=True, norm_layer=nn.LayerNorm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.attn(self.embed(images).flatten(2).transpose(1, 2))


def gc_vit() -> nn.Module:
    """GC ViT, every second block of whose stages takes a q that is made for the whole image."""
    sizes: Any = {"window_size": (4, 2), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    return gcvit.GlobalContextVit(img_size=(32, 32), **sizes)


CROSSVIT: Any = crossvit.CrossVit  # its norm_layer is declared a class and is a partial
RELATIVES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gated": (Gated, 32),
    "rope": (named("vit_small_patch16_rope_mixed_224"), 32),
    "pooling": (named("vit_base_patch16_siglip_224"), 32),
    "naflex": (partial(timm.create_model, "naflexvit_base_patch16_gap", **UNSIZED), 32),
    "qwen3": (named("qwen3_vit_306m"), 32),
    "deepseek": (named("deepseek_vit_412m", img_size=28), 28),
    "gemma4": (partial(timm.create_model, "gemma4_vit_167m", **UNSIZED), 32),
    "twins, pooled keys": (partial(timm.create_model, "twins_pcpvt_small", img_size=64, depths=(1,) * 4, **FOUR), 64),
    "twins, windows": (partial(timm.create_model, "twins_svt_small", img_size=64, depths=(2, 1, 1, 1), **FOUR), 64),
    "relative positions": (named("vit_relpos_small_patch16_224"), 32),
    "relative positions by table": (named("vit_relpos_small_patch16_224", rel_pos_type="bias"), 32),
    "relative positions, shared": (named("vit_srelpos_small_patch16_224"), 32),
    "beit": (named("beit_base_patch16_224"), 32),
    "beit, shared": (named("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 32),
    "sam": (named("samvit_base_patch16_224", img_size=64, global_attn_indexes=(1,), window_size=3), 64),
    "cait": (named("cait_xxs24_224"), 32),
    "xcit": (named("xcit_nano_12_p16_224"), 32),
    "convit": (named("convit_tiny", local_up_to_layer=1), 32),
    "deep and wide": (named("vit_small_patch16_18x2_224", depth=1), 32),
    "swin v2 cr": (
        partial(
            timm.create_model,
            "swinv2_cr_tiny_224",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(2, 1),
            num_heads=(2, 4),
            num_classes=5,
        ),
        32,
    ),
    "tnt": (
        partial(
            timm.create_model,
            "tnt_s_patch16_224",
            img_size=32,
            embed_dim=24,
            inner_dim=12,
            depth=2,
            num_heads_inner=2,
            num_heads_outer=2,
            num_classes=5,
        ),
        32,
    ),
    "crossvit": (
        partial(
            CROSSVIT,
            img_size=48,
            img_scale=(1.0, 1.0),
            patch_size=(12, 16),
            embed_dim=(24, 24),
            depth=((1, 2, 0),),
            num_heads=(2, 2),
            mlp_ratio=(2, 2, 1),
            qkv_bias=True,
            num_classes=5,
        ),
        48,
    ),
    "volo": (partial(volo.VOLO, img_size=32, layers=(1, 1, 1, 1), stem_hidden_dim=8, **FOUR), 32),
    "nest": (
        partial(
            nest.Nest,
            img_size=32,
            num_levels=2,
            embed_dims=(24, 24),
            num_heads=(2, 2),
            depths=(1, 1),
            num_classes=5,
        ),
        32,
    ),
    "davit": (
        partial(davit.DaVit, depths=(1, 1), embed_dims=(24, 24), num_heads=(2, 2), window_size=4, num_classes=5),
        32,
    ),
    "edgenext": (
        partial(
            edgenext.EdgeNeXt,
            dims=(12, 12, 24, 24),
            depths=(1, 1, 2, 1),
            global_block_counts=(0, 0, 1, 0),
            heads=(2, 2, 2, 2),
            num_classes=5,
        ),
        64,
    ),
    "gc vit": (gc_vit, 32),
    "hiera of sam 2": (
        partial(
            hieradet_sam2.HieraDet,
            embed_dim=24,
            num_heads=2,
            stages=(1, 2, 1, 1),
            window_spec=(4, 2, 2, 2),
            global_att_blocks=(2,),
            q_pool=1,
            num_classes=5,
        ),
        32,
    ),
}
each = pytest.mark.parametrize("label", RELATIVES)


def tiny(label: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of that label with weights that make every part matter, and two images."""
    build, side = RELATIVES[label]
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side)
    return shaken_(build()).eval().requires_grad_(False), images


def macs(model: nn.Module, images: torch.Tensor) -> int:
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, kept_widths(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    return counter.get_total_flops() // 2


@each
@torch.no_grad()
def test_a_class_keeps_the_laws(label: str):
    model, images = tiny(label)
    contract, plan = contract_of(model, images[:1]), random_plan(model, label, 1)
    dense = macs(model, images)
    model, images = model.double(), images.double()
    require_certificate(model, contract.groups, plan, images)
    assert torch.equal(cut_(copy.deepcopy(model), full_plan(model, label))(images), model(images))
    masked, pruned = copy.deepcopy(model), cut_(copy.deepcopy(model), plan)
    harden_(gated(masked), plan)
    assert relative_error(pruned(images), masked(images)) <= 1e-10
    assert relative_error(pruned(images), model(images)) > 1e-3  # something was cut
    assert MacCost.of(model, contract, dense).predicted(plan) == macs(pruned, images)


@torch.no_grad()
@pytest.mark.parametrize("label", ["cait", "tnt"])
def test_a_block_that_no_stream_leads_through_is_refitted_as_well(label: str):
    model, images = tiny(label)
    groups, plan = contract_of(model, images[:1]).groups, random_plan(model, label, 1)
    assert any(step.alone for step in walk(model, list(dict.fromkeys(group.block for group in groups)), [images[:1]]))
    more = torch.randn(48, *images.shape[1:])
    pruned = cut_(copy.deepcopy(model), plan)
    before = relative_error(pruned(more), model(more))
    refit_(pruned, model, groups, plan, [more[:24], more[24:]])
    assert relative_error(pruned(more), model(more)) < before / 2


@torch.no_grad()
def test_what_is_left_of_branches_that_no_stream_leads_through_is_refitted_as_well():
    sizes: Any = {
        "window_size": (4, 2),
        "window_ratio": (8, 16),
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (2, 4),
    }
    model = shaken_(gcvit.GlobalContextVit(img_size=(32, 32), num_classes=5, **sizes)).eval()
    more = torch.randn(48, 3, 32, 32)
    groups, plan = contract_of(model, more[:1]).groups, random_plan(model, "gc vit", 1, going=1)
    assert all(step.alone for step in walk(model, list(dict.fromkeys(group.block for group in groups)), [more[:1]]))
    fitted = refit_(cut_(copy.deepcopy(model), plan), model, groups, plan, [more[:24], more[24:]])
    for site in plan.gone:
        [linear] = fitted.get_submodule(site).children()
        given: list[torch.Tensor] = []
        hook = model.get_submodule(site).register_forward_hook(lambda *seen, given=given: given.append(seen[-1]))
        model(more)
        hook.remove()
        torch.testing.assert_close(linear.bias, given[0].flatten(0, -2).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("label", "axis"), [("cait", "heads"), ("sam", "attn_query"), ("nest", "attn_value")])
def test_what_a_class_forbids_is_no_part_of_a_plan(label: str, axis: str):
    model, _ = tiny(label)
    group = next(group for group in groups_of(model) if group.axis == axis and group.whole)
    plan = full_plan(model, label)
    fewer = range(1) if axis == "heads" else range(group.heads)
    entries = [
        kept.model_copy(
            update={"kept_heads": tuple(fewer), "channels": kept.channels[: len(fewer)]}
            if axis == "heads"
            else {"channels": tuple(row[1:] for row in kept.channels)}
        )
        if kept.site == group.site and axis in ("heads", kept.axis)
        else kept
        for kept in plan.groups
    ]
    with pytest.raises(PlanMismatchError, match="cannot be parted"):
        cut_(model, plan.model_copy(update={"groups": tuple(entries)}))


def test_classifiers_are_found_whatever_they_lie_in():
    model = RELATIVES["crossvit"][0]()
    assert [layer.out_features for layer in classifiers(model)] == [5, 5]
    assert classifiers(nn.Linear(2, 2)) == ()
