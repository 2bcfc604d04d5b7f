"""The laws over one tiny network of each class that has convolutions, batch norms or squeeze and excitation."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from timm.models import (
    edgenext,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    fastvit,
    iformer,
    levit,
    lowformer,
    maxxvit,
    metaformer,
    pvt_v2,
    repvit,
    shvit,
    swiftformer,
    tiny_vit,
    visformer,
)
from timm.models._efficientnet_blocks import (
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models.byobnet import ByobNet, ByoModelCfg
from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block, _mobilevitv2_block
from timm.models.vitamin import MbConvLNBlock
from torch import nn

import kcrprune
from kcrprune.config import RunConfig
from kcrprune.families import contract_of, forget_caches_, groups_of
from kcrprune.graphs import export_onnx
from kcrprune.method.cost import MacCost
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.certificate import require_certificate
from kcrprune.surgery.gated import add_gates_, harden_
from kcrprune.surgery.narrow import cut_, expand_, full_plan
from kcrprune.surgery.refit import refit_
from kcrprune.training.innovations import innovations_of
from kcrprune.training.scores import fisher_scores
from kcrprune.training.step import train_
from tests.tiny import random_plan, relative_error, torch_macs

SIDE = 64
DEFAULT = RunConfig.model_fields["axes"].default


def _mobilevit(*, second: bool, **others: Any) -> nn.Module:
    """A MobileViT of either version."""
    hybrid = (
        _mobilevitv2_block(d=1, c=16, s=2, transformer_depth=2)
        if second
        else _mobilevit_block(d=1, c=16, s=2, transformer_dim=16, transformer_depth=2, patch_size=2, br=2.0)
    )
    blocks = (_inverted_residual_block(d=2, c=8, s=2, br=2.0), hybrid)
    cfg = ByoModelCfg(blocks=blocks, stem_chs=8, stem_type="3x3", stem_pool="", downsample="", act_layer="silu")
    return ByobNet(cfg, **others)


def _pvt(**others: Any) -> nn.Module:
    return pvt_v2.PyramidVisionTransformerV2(
        depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2, 2), **others
    )


def _bottlenecks(num_classes: int) -> nn.Module:
    """The blocks that mobile networks are made of, some with squeeze and excitation."""
    squeeze: Any = partial(SqueezeExcite, rd_ratio=0.25)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        InvertedResidual(8, 8, exp_ratio=3, se_layer=squeeze),
        EdgeResidual(8, 12, stride=2, exp_ratio=2, se_layer=squeeze),
        UniversalInvertedResidual(12, 12, exp_ratio=2, layer_scale_init_value=0.1),
        UniversalInvertedResidual(12, 12, exp_ratio=2, dw_kernel_size_mid=5, dw_kernel_size_end=3),
        MbConvLNBlock(12, 12),
        efficientformer.MetaBlock2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def maxvit_cfg() -> maxxvit.MaxxVitCfg:
    return maxxvit.MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(1, 2),
        block_type=("M", ("C", "T")),
        stem_width=8,
        conv_cfg=maxxvit.MaxxVitConvCfg(),
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "levit": partial(levit.Levit, SIDE, embed_dim=(12, 16), key_dim=4, depth=(1, 1), num_heads=(2, 2)),
    "levit_conv": partial(
        levit.Levit, SIDE, embed_dim=(12, 16), key_dim=4, depth=(1, 1), num_heads=(2, 2), use_conv=True
    ),
    "tiny_vit": partial(
        tiny_vit.TinyVit, embed_dims=(8, 8, 16, 16), depths=(1,) * 4, num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 2)
    ),
    "efficientvit": partial(
        efficientvit_mit.EfficientVit, widths=(4, 8, 8, 16), depths=(1,) * 4, head_dim=4, head_widths=(16, 16)
    ),
    "efficientvit_large": partial(
        efficientvit_mit.EfficientVitLarge, widths=(4, 8, 8, 16), depths=(1,) * 4, head_dim=4, head_widths=(16, 16)
    ),
    "efficientvit_msra": partial(
        efficientvit_msra.EfficientVitMsra,
        SIDE,
        embed_dim=(8, 12),
        key_dim=(2, 2),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=(4, 4),
        kernels=(3, 3),
        down_ops=(("", 1), ("subsample", 2)),
    ),
    "pvt": partial(_pvt, linear=False),
    "pvt_linear": partial(_pvt, linear=True),
    "efficientformer_v2": partial(
        efficientformer_v2.EfficientFormerV2,
        (1, 1, 2),
        embed_dims=(8, 8, 16),
        img_size=SIDE,
        downsamples=(False, True, True),
        num_vit=1,
    ),
    "fastvit": partial(
        fastvit.FastVit, layers=(1, 1), token_mixers=("repmixer", "attention"), embed_dims=(16, 32), mlp_ratios=(2, 2)
    ),
    "caformer": partial(
        metaformer.MetaFormer,
        depths=(1, 1),
        dims=(8, 32),
        token_mixers=[metaformer.SepConv, metaformer.Attention],
        norm_layers=[metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias],
        res_scale_init_values=(None, 1.0),
    ),
    "repvit": partial(repvit.RepVit, img_size=SIDE, embed_dim=(8, 16), depth=(1, 2)),
    "shvit": partial(shvit.SHViT, embed_dim=(8, 12, 16), partial_dim=(4, 4, 4), qk_dim=(4, 4, 4), depth=(1, 1, 1)),
    "swiftformer": partial(swiftformer.SwiftFormer, layers=[1, 1], embed_dims=[8, 16], downsamples=[False, True]),
    "iformer": partial(iformer.IFormer, dims=(8, 8, 16, 16), depths=(1,) * 4, attn_groups=(0,) * 4),
    "lowformer": partial(lowformer.LowFormer, [4, 8, 16, 16], [1] * 4, head_widths=(16, 16)),
    "visformer": partial(
        visformer.Visformer, SIDE, init_channels=8, embed_dim=32, depth=(1, 1, 1), num_heads=2, spatial_conv="100"
    ),
    "edgenext": partial(edgenext.EdgeNeXt, dims=(8, 8, 16, 16), depths=(1, 2, 1, 2), heads=(2,) * 4),
    "maxvit": partial(maxxvit.MaxxVit, maxvit_cfg(), SIDE),
    "mobilevit": partial(_mobilevit, second=False),
    "mobilevitv2": partial(_mobilevit, second=True),
    "bottlenecks": _bottlenecks,
}


@cache
def network(name: str) -> nn.Module:
    """With weights that make every part matter, batch norms whose statistics are those of images, in float64."""
    torch.manual_seed(0)
    model = forget_caches_(NETWORKS[name](num_classes=5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()(images(8))
    return model.eval().double()


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_masking_is_cutting_and_the_rules_hold(name: str):
    model, x = network(name), images().double()
    groups, plan = groups_of(model), random_plan(model, name, 1)
    dense, pruned = model(x), cut_(copy.deepcopy(model), plan)
    masked = copy.deepcopy(model)
    harden_(add_gates_(masked, groups, [group for group in groups if not group.whole]), plan)
    assert torch.equal(cut_(copy.deepcopy(model), full_plan(model, name))(x), dense)
    assert relative_error(pruned(x), masked(x)) <= 1e-10 < relative_error(pruned(x), dense)
    assert relative_error(expand_(copy.deepcopy(model), pruned, plan)(x), pruned(x)) <= 1e-10
    require_certificate(model, groups, plan, x)
    cost = MacCost.of(model, contract_of(model, (3, SIDE, SIDE)), torch_macs(model, x[:1]))
    assert cost.predicted(plan) == torch_macs(pruned, x[:1])


@pytest.mark.parametrize(
    "name", ["levit", "tiny_vit", "pvt", "maxvit", "mobilevit", "mobilevitv2", "efficientvit_msra", "fastvit"]
)
def test_balance_scores_and_refit_reach_every_group(name: str):
    model, x = copy.deepcopy(network(name)), images(12, 1).double()
    with torch.no_grad():
        dense = model(x)
        balance_(model, groups_of(model), [x])
        assert relative_error(model(x), dense) <= 1e-6
    scored = copy.deepcopy(model).float()
    open_ = [group for group in groups_of(model) if group.axis in DEFAULT and not group.whole]
    found = innovations_of(scored, open_, [x[:6].float()], torch.Generator().manual_seed(0))
    gates = add_gates_(scored, groups_of(model), open_, innovations=found)
    assert relative_error(scored(x.float()), dense.float()) <= 1e-4
    scores = fisher_scores(scored, gates, [x[:6].float()], torch.Generator().manual_seed(0))
    assert all(score.any() and score.isfinite().all() for score in scores.values())
    refitted(model, name, x, dense)


@torch.no_grad()
def refitted(model: nn.Module, name: str, x: torch.Tensor, dense: torch.Tensor) -> None:
    """The refit brings a cut network nearer, and where it has no bias of its own a batch norm takes that in."""
    groups = contract_of(model, (3, SIDE, SIDE)).groups
    plan = random_plan(model, name, 1)
    pruned = cut_(copy.deepcopy(model), plan)
    before, norms = relative_error(pruned(x), dense), norm_means(pruned)
    refit_(pruned, model, groups, plan, [x[:6], x[6:]])
    assert relative_error(pruned(x), dense) < 0.7 * before
    behind = [group.affine for group in groups if group.affine]
    assert all(not torch.equal(norm_means(pruned)[norm], norms[norm]) for norm in behind[1:])


@torch.no_grad()
def test_a_refit_goes_on_behind_any_block_where_streams_begin_anew():
    model, x = network("mobilevitv2"), images(4).double()
    groups, plan = contract_of(model, (3, SIDE, SIDE)).groups, random_plan(model, "mobilevitv2", 1)
    pruned, states = cut_(copy.deepcopy(model), plan), {}

    def kept(done: int) -> None:
        states[done] = copy.deepcopy(pruned.state_dict())

    refit_(pruned, model, groups, plan, [x], on_block=kept)
    for done, state in list(states.items())[::2]:
        again = cut_(copy.deepcopy(model), plan)
        again.load_state_dict(state)
        refit_(again, model, groups, plan, [x], begin=done)
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in pruned.state_dict().items())


def test_training_leaves_batch_norms_what_they_have_seen_and_caches_are_forgotten():
    model = copy.deepcopy(network("levit")).float()
    train_(model)
    before, x = norm_means(model), images(4)
    model(x).square().sum().backward()
    assert model.training
    assert all(torch.equal(mean, before[name]) for name, mean in norm_means(model).items())
    model.eval()
    for _ in range(2):  # a table that is kept could be followed back once
        model(x).square().sum().backward()
    with torch.no_grad():
        first = model(x)
        next(p for name, p in model.named_parameters() if name.endswith("attention_biases")).add_(torch.arange(16) / 4)
        assert not torch.equal(model(x), first)


def norm_means(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the batch norms of a network subtract."""
    return {
        name.removesuffix(".running_mean"): buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith("running_mean")
    }


@pytest.mark.parametrize("name", ["mobilevit", "fastvit"])
def test_a_run_cuts_it_and_its_graph_computes_what_it_does(name: str, tmp_path):
    model, batches = copy.deepcopy(network(name)).float(), [images(4, seed) for seed in range(3)]
    sizes = {"calibration_images": 8, "score_images": 8, "round_to": 2}
    result = kcrprune.compress(model, images=batches, target_flops=0.9, recover_steps=0, device="cpu", **sizes)
    after, dense = result.comparison.after, result.comparison.before.macs
    assert after.macs
    assert dense
    assert after.macs <= 0.9 * dense
    assert relative_error(result.model(batches[0]), model(batches[0])) > 0
    export_onnx(result.model, tmp_path / "model.onnx", input_size=(3, SIDE, SIDE), metadata={}, batch_sizes=(1, 2))
