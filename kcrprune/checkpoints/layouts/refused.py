"""Networks that look like a ViT or a Swin, or are asked for often, and do not open from shapes; with the reason."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Final

from kcrprune.checkpoints.layouts.base import Shapes


@dataclass(frozen=True)
class Refused:
    """A network that is recognised by a part of its tensors' names, and why its sizes cannot be told from shapes.

    `like` is one of timm's, which can be cut: in timm's names and sizes such a network opens. Where there is none, no
    part of it has a rule.
    """

    name: str
    matches: Callable[[Shapes], bool]
    reason: str
    like: str = ""

    def sentence(self) -> str:
        """What a file of this kind is answered with."""
        if not self.like:
            return f"a {self.name}, which cannot be cut: {self.reason}"
        return (
            f"a {self.name}, which opens under timm's names and in sizes that timm registers alone, as {self.like}: "
            f"{self.reason}"
        )


def _part(*parts: str) -> Callable[[Shapes], bool]:
    """Every part occurs in some name."""
    return lambda shapes: all(any(part in name for name in shapes) for part in parts)


def _rotary(shapes: Shapes) -> bool:
    """Only rotary ViTs of timm and DeiT III call LayerScale gamma_1, and the latter has a table without the class."""
    found = next((name for name in shapes if name.endswith("blocks.0.gamma_1")), None)
    if found is None:
        return False
    table = shapes.get(found.removesuffix("blocks.0.gamma_1") + "pos_embed", ())
    return len(table) != 3 or isqrt(table[1]) ** 2 != table[1]


def _naflex(shapes: Shapes) -> bool:
    """Patches are rows of a matrix, and there is no class token."""
    found = [shape for name, shape in shapes.items() if name.endswith("embeddings.patch_embedding.weight")]
    return any(len(shape) == 2 for shape in found)


def _hierarchical(shapes: Shapes) -> bool:
    return any(re.search(r"blocks\.\d+\.proj\.weight$", name) for name in shapes)


REFUSED: Final = (
    Refused(
        "SwinV2",
        _part("attn.logit_scale", "cpb_mlp"),
        "its attention is a cosine with a learned scale and its norms follow the residual branch",
        "swinv2_tiny_window8_256",
    ),
    Refused(
        "SwinV2 of Hugging Face",
        _part("continuous_position_bias_mlp"),
        "its attention is a cosine with a learned scale and its norms follow the residual branch",
        "swinv2_tiny_window8_256",
    ),
    Refused(
        "BEiT of Hugging Face",
        _part("relative_position_bias_table", "lambda_1"),
        "its key has no bias and its attention adds relative positions",
        "beit_base_patch16_224",
    ),
    Refused(
        "ViT with SwiGLU (EVA-02, AIMv2)",
        _part("mlp.fc1_g", "mlp.fc1_x"),
        "its MLP is gated (SwiGLU)",
        "eva02_base_patch14_224",
    ),
    Refused(
        "ViT with SwiGLU (EVA-02)",
        _part("mlp.w1.", "mlp.w2.", "mlp.w3."),
        "its MLP is gated (SwiGLU)",
        "eva02_base_patch14_224",
    ),
    Refused(
        "BEiT or EVA",
        _part("attn.q_bias", "attn.v_bias"),
        "its biases of q and v are parameters of their own, and its positions are relative or rotary",
        "beit_base_patch16_224",
    ),
    Refused("ViT with SwiGLU", _part("mlp.w12.", "mlp.w3."), "its MLP is gated (SwiGLU)", "vit_giant_patch14_dinov2"),
    Refused(
        "DINOv2 of Hugging Face with SwiGLU",
        _part("mlp.weights_in.", "mlp.weights_out."),
        "its MLP is gated (SwiGLU)",
        "vit_giant_patch14_dinov2",
    ),
    Refused("ViT with rotary positions", _rotary, "its positions are rotary", "vit_small_patch16_rope_224"),
    Refused("DINOv3", _part("rope_embed.", "storage_tokens"), "its positions are rotary", "vit_small_patch16_dinov3"),
    Refused(
        "ViT with parallel branches",
        _part("blocks.0.attns.0.", "blocks.0.ffns.0."),
        "its block has parallel branches",
        "vit_small_patch16_18x2_224",
    ),
    Refused(
        "ViT with relative positions",
        _part("rel_pos"),
        "its attention adds relative positions",
        "vit_relpos_small_patch16_224",
    ),
    Refused(
        "NaFlexViT",
        _part("embeds.pos_embed"),
        "its images have any size and any number of tokens",
        "naflexvit_base_patch16_gap",
    ),
    Refused(
        "SigLIP 2 of any size (NaFlex)",
        _naflex,
        "its images have any size and any number of tokens",
        "naflexvit_base_patch16_siglip",
    ),
    Refused("Hiera", _hierarchical, "its width grows from block to block", "hiera_tiny_224"),
    Refused(
        "hybrid ViT",
        _part("patch_embed.backbone."),
        "its patches come from a convolutional network",
        "vit_small_resnet26d_224",
    ),
    Refused(
        "CaiT", _part("blocks_token_only.0."), "its last blocks attend from the class token alone", "cait_xxs24_224"
    ),
    Refused("XCiT", _part("blocks.0.local_mp."), "its attention runs over channels", "xcit_nano_12_p16_224"),
    Refused("ConvNeXt", _part("stages.0.blocks.0.conv_dw."), "it is a convolutional network", "convnext_tiny"),
    Refused("ConvNeXt of its authors", _part("stages.0.0.dwconv."), "it is a convolutional network", "convnext_tiny"),
    Refused(
        "ConvNeXt of torchvision", _part("features.1.0.layer_scale"), "it is a convolutional network", "convnext_tiny"
    ),
    Refused(
        "MaxViT",
        _part("stages.0.blocks.0.attn_block."),
        "its blocks mix convolutions with window and grid attention",
        "maxvit_tiny_tf_224",
    ),
    Refused("PVT", _part("attn.sr."), "its attention shrinks the keys", "pvt_v2_b0"),
    Refused(
        "ResNet",
        _part("layer1.0.conv1.", "layer4.0.conv1."),
        "it is a convolutional network of which no part has a rule",
    ),
    Refused(
        "EfficientNet or MobileNet",
        _part("blocks.0.0.conv_pw", "conv_stem."),
        "it is a convolutional network",
        "efficientnet_b0",
    ),
)
