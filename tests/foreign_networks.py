"""Tiny networks of other libraries, and one of our own, with weights that make every part matter."""

from collections.abc import Callable
from typing import Any, Final

import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import kcrprune

SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
PLAIN: Final[dict[str, Any]] = SHAPE | {"intermediate_size": 32}


class OwnMlp(nn.Module):
    """Somebody's own branch."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D)."""
        return self.down(self.gate(x).sigmoid() * self.up(x))


class OwnAttention(nn.Module):
    """An attention that splits by the number of its heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D)."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.o(x.transpose(1, 2).flatten(2))


class OwnNetwork(nn.Module):
    """A body of branches in a row, and a head that gives two things."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.body = nn.ModuleDict({"first": OwnMlp(24, 32), "attention": OwnAttention(24, 3), "last": OwnMlp(24, 40)})
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        """Images (B, 3, H, W)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        for branch in self.body.values():
            x = x + branch(x)
        return {"logits": scale * self.head(x.mean(1)), "tokens": x}


OWN_RULES: Final = {
    OwnMlp: kcrprune.hidden_units("up", "gate", reader="down"),
    OwnAttention: kcrprune.whole_heads("q", "k", "v", out="o"),
}


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    shape: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    return lambda: timm.create_model(name, **(shape | arguments))


LABELS: Final[dict[str, Any]] = {"num_labels": 5}
FOREIGN: Final[dict[str, Callable[[], nn.Module]]] = {
    "hf vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**(PLAIN | LABELS))),
    "hf deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**PLAIN)),
    "hf dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2)),
    "hf dinov2 giant": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, use_swiglu_ffn=True)),
    "hf registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2)
    ),
    "hf dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**PLAIN)),
    "hf clip": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**PLAIN, projection_dim=8)
    ),
    "hf msn": lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**PLAIN)),
    "hf ijepa": lambda: transformers.IJepaModel(transformers.IJepaConfig(**PLAIN)),
    "hf siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PLAIN)),
    "hf swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4, **LABELS
        )
    ),
    "torchvision vit": lambda: VisionTransformer(16, 8, 2, 3, 24, 32, num_classes=5),
    "torchvision swin": lambda: SwinTransformer([2, 2], 12, [2, 1], [2, 4], [4, 4], num_classes=5),
    "timm vit": _timm("vit_tiny_patch16_224"),
    "timm features": _timm("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), num_classes=0),
    "own": OwnNetwork,
}


def foreign(name: str) -> Any:
    """A fresh copy, the same each time, in eval mode."""
    torch.manual_seed(0)
    model = FOREIGN[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 4, seed: int = 0) -> Tensor:
    """Random inputs of all of them."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
