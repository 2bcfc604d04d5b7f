"""A Hugging Face classifier that tells where a shape lies: trained, cut, stored, built again, with its own forward."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from shapes import Scenes, scenes
from transformers import ViTConfig, ViTForImageClassification

import kcrprune


def dense_network() -> ViTForImageClassification:
    """A small ViT, as any code of Hugging Face's builds one."""
    shape = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "initializer_range": 0.08,
    }
    return ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, num_labels=4))


def quarters(data: Scenes) -> torch.Tensor:
    """(n,) in which quarter of its image a shape lies."""
    right, below = (data.boxes[:, side::2].mean(1) > 16 for side in (0, 1))
    return right.long() + 2 * below.long()


def train_(model: ViTForImageClassification, data: Scenes, steps: int) -> None:
    """AdamW on random batches."""
    optimizer, labels = torch.optim.AdamW(model.parameters(), lr=5e-4), quarters(data)
    for _ in range(steps):
        picked = torch.randint(len(data), (32,))
        loss = model(pixel_values=data.images[picked], labels=labels[picked]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Scenes) -> float:
    """Share of images whose quarter it names."""
    return float((model(pixel_values=data.images).logits.argmax(1) == quarters(data)).double().mean())


def run(steps: int = 300, count: int = 512, target: float = 0.6) -> dict[str, float]:
    """Figures before and after."""
    torch.manual_seed(0)
    data, fresh, model = scenes(count, (32, 32)), scenes(count // 2, (32, 32), seed=1), dense_network()
    train_(model, data, steps)
    model.eval()
    loader = [{"pixel_values": images, "labels": labels} for images, labels in _batches(data)]
    result = kcrprune.compress(
        model,
        images=loader,
        inputs="pixel_values",
        outputs="logits",
        part="vit",
        target_flops=target,
        recover_steps=min(60, steps),
        calibration_images=256,
        score_images=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = kcrprune.save(result.model, Path(folder, "cut"))
        again = kcrprune.restore(dense_network(), path)
    before, after = result.comparison.before, result.comparison.after
    assert before.macs
    assert after.macs
    return {
        "share of the MACs": after.macs / before.macs,
        "accuracy before": accuracy(model, fresh),
        "accuracy after": accuracy(again, fresh),
        "distance of the logits": result.distances["logits"],
    }


def _batches(data: Scenes) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(data.images.split(32), quarters(data).split(32), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the dense network's training")
    sys.stdout.write(json.dumps(run(parser.parse_args().steps), indent=2) + "\n")
