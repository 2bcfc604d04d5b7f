"""Which parts of convolutional and hybrid networks can be cut: MLPs over positions and inverted bottlenecks.

A rule names what the hidden channels pass, in order, and the 1x1 convolution or linear that reads them. What writes
them is the last layer there that mixes channels, with all that is channel-wise behind it: batch norms, depthwise
convolutions, squeeze and excitation. Where anything else lies between (a norm over channels, a convolution of several
groups, blurred strides), nothing is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
from timm.layers.mlp import ConvMlp
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models import (
    _efficientnet_blocks,
    byobnet,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    fastvit,
    levit,
    maxxvit,
    metaformer,
    mobilevit,
    nextvit,
    pvt_v2,
    repvit,
    tiny_vit,
    visformer,
    vitamin,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kcrprune.families.contract import Branch, Group, Rule, Slot, newer
from kcrprune.families.linears import is_linear
from kcrprune.plan import Axis

SQUEEZES: Final[dict[type, tuple[str, str]]] = {  # what reads all channels, and what writes a factor for each
    SEModule: ("fc1", "fc2"),
    EffectiveSEModule: ("fc", "fc"),
    _efficientnet_blocks.SqueezeExcite: ("conv_reduce", "conv_expand"),
}


@dataclass
class _Between:
    """What lies between the writers of a group and its reader: slots, by the names of their owners."""

    writers: list[str]
    readers: list[str]


def _between(site: nn.Module, names: Sequence[str]) -> _Between | None:
    """The owners that hold a group's channels, walked back from its reader; None where it has no source there."""
    found = _Between([], [])
    for name in reversed(names):
        part = _part(site, name)
        if part is None:
            continue
        if type(part) in SQUEEZES:
            reads, writes = (f"{name}.{own}" for own in SQUEEZES[type(part)])
            found.writers.insert(0, writes)
            found.readers.insert(0, reads)
        elif isinstance(part, BatchNorm) or _is_depthwise(part):
            found.writers.insert(0, name)
        elif isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1):
            found.writers.insert(0, name)
            return found
        else:
            return None
    return None


def _part(site: nn.Module, name: str) -> nn.Module | None:
    """A part of a branch; None where this one does without."""
    part: Any = site
    for step in name.split("."):
        part = getattr(part, step, None)
    return None if isinstance(part, nn.Identity) else part


def _is_depthwise(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv2d) and part.groups == part.in_channels == part.out_channels > 1


def _is_pure(norm: nn.Module | None) -> bool:
    """Whether a batch norm is an affine map, without an activation of its own."""
    own = [module for module in norm.modules() if module is not norm] if norm is not None else []
    return isinstance(norm, BatchNorm) and norm.affine and all(isinstance(module, nn.Identity) for module in own)


def _adds_nothing(module: Any) -> bool:
    return False


def _rule(
    between: str,
    reader: str,
    *,
    norm: str = "",
    scale: str = "",
    axis: Axis = "mlp_hidden",
    adds: Callable[[Any], bool] = _adds_nothing,
    packed: bool = False,
) -> Rule:
    """The rule of channels that pass the parts `between` and are read by `reader`, behind which lie `norm` and `scale`.

    `adds` says of a module whether it adds what comes out there to what it takes in.
    """

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        found, last = _between(module, between.split()), _part(module, reader)
        if found is None or last is None or not is_linear(last):
            return ()
        width = last.weight.shape[1]
        starts = (0, width) if packed else (0,)
        behind = _part(module, norm) if norm else None
        adding = adds(module) and (behind is None or _is_pure(behind))
        return (
            Group(
                site,
                axis,
                1,
                width,
                tuple(Slot(f"{site}.{name}", 0, start) for name in found.writers for start in starts),
                tuple(Slot(f"{site}.{name}", 1) for name in (reader, *found.readers)),
                affine=f"{site}.{norm}" if _is_pure(behind) else None,
                stream=site if adding else None,
                scale=f"{site}.{scale}" if adding and scale and _part(module, scale) is not None else None,
            ),
        )

    return groups


def _bottleneck(between: str, reader: str, **others: Any) -> Rule:
    return _rule(between, reader, axis="conv_hidden", **others)


def _of_main(rules: dict[type, Rule]) -> Rule:
    """The rule of a residual block around one of some bottlenecks, which is the block that users see."""

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        rule = rules.get(type(module.main))
        return rule(site, module) if rule else ()

    return groups


def _skips(name: str, *others: str) -> Callable[[Any], bool]:
    """Whether the part `name` passes the input on as it is, and none of the others is there."""

    def adds(module: Any) -> bool:
        passes = isinstance(getattr(module, name), nn.Identity)
        return passes and all(_part(module, other) is None for other in others)

    return adds


def _has_skip(module: Any) -> bool:
    return module.has_skip and _part(module, "dw_end") is None


def _separable(site: str, module: nn.Module) -> tuple[Group, ...]:
    """MobileViT v2's attention: a context vector of keys times values, channel by channel."""
    attention: Any = module
    width, owner = attention.embed_dim, f"{site}.qkv_proj"
    return (
        Group(
            site,
            "conv_hidden",
            1,
            width,
            (Slot(owner, 0, 1), Slot(owner, 0, 1 + width)),  # behind the one row of the query
            (Slot(f"{site}.out_proj", 1),),
            told="embed_dim",
        ),
    )


_MAIN: Final[dict[type, Rule]] = {
    cls: _bottleneck(
        " ".join(f"main.{name}.conv main.{name}.norm" for name in names.split()),
        "main.point_conv.conv",
        norm="main.point_conv.norm",
        adds=_skips("shortcut", "pre_norm"),
    )
    for module, cls_names in (
        ("efficientvit_mit", {"MBConv": "inverted_conv depth_conv", "FusedMBConv": "spatial_conv"}),
        ("lowformer", {"MBConv": "inverted_conv depth_conv", "FusedMBConv": "spatial_conv"}),
        ("cpubone", {"MBConv": "inverted_conv depth_conv", "FusedMBConv": "spatial_conv"}),
    )
    for cls_name, names in cls_names.items()
    for cls in (newer(module, cls_name),)
}
_RESIDUAL: Final = _of_main(_MAIN)
_MERGING: Final = _bottleneck("conv1.conv conv1.bn conv2.conv conv2.bn se", "conv3.conv", norm="conv3.bn")

CONVOLUTIONS: Final[dict[type, Rule]] = {
    ConvMlp: _rule("fc1 norm", "fc2"),
    pvt_v2.MlpWithDepthwiseConv: _rule("fc1 dwconv", "fc2"),
    levit.LevitMlp: _rule("ln1.linear ln1.bn", "ln2.linear", norm="ln2.bn"),
    tiny_vit.NormMlp: _rule("fc1", "fc2"),
    efficientformer.ConvMlpWithNorm: _rule("fc1 norm1", "fc2", norm="norm2"),
    efficientformer_v2.ConvMlpWithNorm: _rule("fc1.conv fc1.bn mid.conv mid.bn", "fc2.conv", norm="fc2.bn"),
    efficientvit_msra.ConvMlp: _rule("pw1.conv pw1.bn", "pw2.conv", norm="pw2.bn"),
    fastvit.ConvMlp: _rule("fc1", "fc2"),
    repvit.RepVitMlp: _rule("conv1.c conv1.bn", "conv2.c", norm="conv2.bn"),
    newer("shvit", "FFN"): _rule("pw1.c pw1.bn", "pw2.c", norm="pw2.bn"),
    newer("swiftformer", "Mlp"): _rule("fc1", "fc2"),
    newer("efficientvim", "FFN"): _rule("fc1.conv fc1.norm", "fc2.conv", norm="fc2.norm"),
    visformer.SpatialMlp: _rule("conv1 conv2", "conv3"),
    # inverted bottlenecks, and what merges patches through one
    byobnet.BottleneckBlock: _bottleneck(
        "conv1_1x1.conv conv1_1x1.bn conv1_1x1.aa conv2_kxk.conv conv2_kxk.bn conv2_kxk.aa "
        "conv2b_kxk.conv conv2b_kxk.bn conv2b_kxk.aa attn",
        "conv3_1x1.conv",
        norm="conv3_1x1.bn",
        adds=_skips("shortcut", "attn_last", "act"),
    ),
    mobilevit.LinearSelfAttention: _separable,
    efficientvit_mit.ResidualBlock: _RESIDUAL,
    newer("lowformer", "ResidualBlock"): _RESIDUAL,
    newer("cpubone", "ResidualBlock"): _RESIDUAL,
    tiny_vit.MBConv: _bottleneck("conv1.conv conv1.bn conv2.conv conv2.bn", "conv3.conv", norm="conv3.bn"),
    tiny_vit.PatchMerging: _MERGING,
    efficientvit_msra.PatchMerging: _MERGING,
    newer("shvit", "PatchMerging"): _bottleneck("conv1.c conv1.bn conv2.c conv2.bn se", "conv3.c", norm="conv3.bn"),
    maxxvit.MbConvBlock: _bottleneck(
        "conv1_1x1 norm1 conv2_kxk se_early norm2 se", "conv3_1x1", adds=_skips("shortcut")
    ),
    vitamin.MbConvLNBlock: _bottleneck("conv1_1x1 conv2_kxk", "conv3_1x1", adds=_skips("shortcut")),
    _efficientnet_blocks.InvertedResidual: _bottleneck(
        "conv_pw bn1 conv_dw bn2 aa se", "conv_pwl", norm="bn3", adds=_has_skip
    ),
    _efficientnet_blocks.UniversalInvertedResidual: _bottleneck(
        "pw_exp.conv pw_exp.bn pw_exp.aa dw_mid.conv dw_mid.bn dw_mid.aa se",
        "pw_proj.conv",
        norm="pw_proj.bn",
        scale="layer_scale",
        adds=_has_skip,
    ),
    _efficientnet_blocks.EdgeResidual: _bottleneck("conv_exp bn1 aa se", "conv_pwl", norm="bn2", adds=_has_skip),
    metaformer.SepConv: _bottleneck("pwconv1 dwconv", "pwconv2"),
    newer("swiftformer", "ConvEncoder"): _bottleneck("pwconv1", "pwconv2", scale="layer_scale", adds=lambda _: True),
    newer("swiftformer", "LocalRepresentation"): _bottleneck(
        "pwconv1", "pwconv2", scale="layer_scale", adds=lambda _: True
    ),
    newer("iformer", "ConvBlock"): _bottleneck(
        "mixer.module.1.c mixer.module.1.bn", "mixer.module.3.c", norm="mixer.module.3.bn"
    ),
    newer("iformer", "FFN"): _rule("mixer.module.0.c mixer.module.0.bn", "mixer.module.2.c", norm="mixer.module.2.bn"),
}

CONVOLUTIONAL_BLOCKS: Final[dict[type, dict[str, Branch]]] = {
    pvt_v2.Block: {"attn": Branch("norm1", behind="norm2"), "mlp": Branch("norm2")},
    levit.LevitBlock: {"attn": Branch("", behind="mlp"), "mlp": Branch("")},
    levit.LevitDownsample: {"mlp": Branch("")},
    tiny_vit.TinyVitBlock: {"mlp": Branch("")},
    mobilevit.LinearTransformerBlock: {"attn": Branch("norm1", behind="norm2"), "mlp": Branch("norm2")},
    efficientformer.MetaBlock1d: {"mlp": Branch("norm2", "ls2")},
    efficientformer.MetaBlock2d: {"mlp": Branch("", "ls2")},
    efficientformer_v2.EfficientFormerV2Block: {"mlp": Branch("", "ls2")},
    efficientvit_msra.ResidualDrop: {"m": Branch("")},
    fastvit.RepMixerBlock: {"mlp": Branch("", "layer_scale")},
    fastvit.AttentionBlock: {"mlp": Branch("", "layer_scale_2")},
    maxxvit.PartitionAttentionCl: {"attn": Branch("norm1", "ls1", "norm2"), "mlp": Branch("norm2", "ls2")},
    maxxvit.TransformerBlock2d: {"mlp": Branch("norm2", "ls2")},
    nextvit.NextConvBlock: {"mlp": Branch("norm")},
    nextvit.NextTransformerBlock: {"mlp": Branch("norm2")},
    repvit.RepViTBlock: {"channel_mixer": Branch("")},
    repvit.RepVitDownsample: {"ffn": Branch("")},
    newer("shvit", "Residual"): {"m": Branch("")},
    newer("swiftformer", "Block"): {"linear": Branch("", "layer_scale_2")},
    visformer.Block: {"attn": Branch("norm1", behind="norm2"), "mlp": Branch("norm2")},
}


def forget_caches_(model: nn.Module) -> nn.Module:
    """Lets attentions look their biases up anew in each pass.

    timm's keep them as long as nothing is trained, though a table that is cut or loaded gives others, and though what
    has a gradient can be followed back only once.
    """
    for module in model.modules():
        if isinstance(getattr(module, "attention_bias_cache", None), dict):
            module.get_attention_biases = MethodType(_biases, module)  # type: ignore[assignment]
    return model


def _biases(attention: Any, device: torch.device) -> Tensor:
    return attention.attention_biases[:, attention.attention_bias_idxs]
