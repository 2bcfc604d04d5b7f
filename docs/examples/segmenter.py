"""A segmentation head on a ViT: the ViT is cut, the head is trained on with it by the loss of the task."""

import argparse
import json
import sys
from typing import Any

import timm
import torch
from shapes import Scenes, scenes
from torch import Tensor, nn

import kcrprune


class Segmenter(nn.Module):
    """Tokens of a ViT, a linear head on each, brought to the size of the image: logits (B, 2, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"img_size": 48, "patch_size": 6, "embed_dim": 96, "depth": 4, "num_heads": 4}
        self.backbone = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=0, global_pool="")
        self.head = nn.Linear(96, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 48, 48)."""
        tokens = self.head(self.backbone(images)[:, 1:])
        maps = tokens.transpose(1, 2).unflatten(2, (8, 8))
        return nn.functional.interpolate(maps, scale_factor=6, mode="bilinear")


def task_loss(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of each pixel; the function has a name, so that a run with `out` could be gone on with."""
    return nn.functional.cross_entropy(logits, batch["masks"])


def train_(model: nn.Module, data: Scenes, steps: int) -> None:
    """AdamW on random batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        picked = torch.randint(len(data), (32,))
        optimizer.zero_grad()
        task_loss(model(data.images[picked]), {"masks": data.masks[picked]}).backward()
        optimizer.step()


@torch.no_grad()
def overlap(model: nn.Module, data: Scenes) -> float:
    """Intersection over union of all masks together."""
    found, wanted = model(data.images).argmax(1).bool(), data.masks.bool()
    return float((found & wanted).sum() / (found | wanted).sum())


def run(steps: int = 300, count: int = 512, target: float = 0.6) -> dict[str, float]:
    """Figures before and after."""
    torch.manual_seed(0)
    data, fresh, model = scenes(count, (48, 48)), scenes(count // 3, (48, 48), seed=1), Segmenter()
    train_(model, data, steps)
    model.eval()
    batches = zip(data.images.split(32), data.masks.split(32), strict=True)
    result = kcrprune.compress(
        model,
        images=[{"images": images, "masks": masks} for images, masks in batches],
        inputs="images",
        part="backbone",
        loss=task_loss,
        target_flops=target,
        recover_steps=min(60, steps),
        calibration_images=256,
        score_images=256,
    )
    before, after = result.comparison.before, result.comparison.after
    assert before.macs
    assert after.macs
    return {
        "share of the MACs": after.macs / before.macs,
        "overlap before": overlap(model, fresh),
        "overlap after": overlap(result.model, fresh),
        **{f"distance of {name}": distance for name, distance in result.distances.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the dense network's training")
    sys.stdout.write(json.dumps(run(parser.parse_args().steps), indent=2) + "\n")
