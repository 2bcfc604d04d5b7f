"""A torchvision detector around a Swin: the backbone is cut, the detector trained on by its own losses, two sizes."""

import argparse
import json
import sys
from typing import Any

import timm
import torch
from shapes import CLASSES, scenes
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import kcrprune

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
SIZES = ((64, 64), (64, 96))


class Pyramid(nn.Module):
    """The stages of a Swin (timm's `features_only`) as a pyramid of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(
            "swin_tiny_patch4_window7_224",
            features_only=True,
            strict_img_size=False,
            img_size=64,
            embed_dim=32,
            depths=(2, 2, 2),
            num_heads=(2, 4, 8),
            window_size=4,
            out_indices=(0, 1, 2),
        )
        self.out_channels = 32
        self.fpn = FeaturePyramidNetwork([32, 64, 128], 32)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to maps (B, 32, ...)."""
        return self.fpn({str(i): each.permute(0, 3, 1, 2) for i, each in enumerate(self.body(images))})


def detector() -> RetinaNet:
    """A small one."""
    anchors = AnchorGenerator(tuple((size,) for size in (16, 28, 40)), ((1.0,),) * 3)
    plain: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 64, "max_size": 96}
    return RetinaNet(Pyramid(), len(CLASSES), anchor_generator=anchors, **plain)


def batches(count: int, seed: int) -> list[Batch]:
    """Batches of 8 images with their boxes; each batch has one of two sizes."""
    found: list[Batch] = []
    for index in range(count):
        made = scenes(8, SIZES[index % 2], seed=1000 * seed + index)
        targets = [
            {"boxes": box[None], "labels": kind[None]} for box, kind in zip(made.boxes, made.classes, strict=True)
        ]
        found.append((list(made.images), targets))
    return found


def losses(returned: Any, batch: Batch) -> Tensor:
    """The detector's own, which it gives in training."""
    return returned["classification"] + returned["bbox_regression"]


def train_(model: nn.Module, data: list[Batch], steps: int) -> None:
    """AdamW over the batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    model.train()
    for step in range(steps):
        batch = data[step % len(data)]
        optimizer.zero_grad()
        losses(model(*batch), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def found_shapes(model: nn.Module, data: list[Batch]) -> float:
    """Share of images whose surest box overlaps the shape by half at least and names its class."""
    right = []
    for images, targets in data:
        for answer, target in zip(model.eval()(images), targets, strict=True):
            box, kind = answer["boxes"][:1], answer["labels"][:1]
            right.append(len(box) == 1 and bool(box_iou(box, target["boxes"]) > 0.5) and bool(kind == target["labels"]))
    return sum(right) / len(right)


def run(steps: int = 300, count: int = 40, target: float = 0.7) -> dict[str, float]:
    """Figures before and after."""
    torch.manual_seed(0)
    data, fresh, model = batches(count, seed=0), batches(max(2, count // 4), seed=1), detector()
    train_(model, data, steps)
    model.eval()
    result = kcrprune.compress(
        model,
        images=data,
        part="backbone.body",
        outputs="backbone",
        loss=losses,
        target_flops=target,
        recover_steps=min(60, steps),
        calibration_images=256,
        score_images=256,
        lr=1e-4,
    )
    before, after = result.comparison.before, result.comparison.after
    assert before.macs
    assert after.macs
    return {
        "share of the backbone's MACs": after.macs / before.macs,
        "found before": found_shapes(model, fresh),
        "found after": found_shapes(result.model, fresh),
        **{f"distance of {name}": distance for name, distance in result.distances.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the dense network's training")
    sys.stdout.write(json.dumps(run(parser.parse_args().steps), indent=2) + "\n")
