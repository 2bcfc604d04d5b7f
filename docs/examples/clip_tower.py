"""The image tower of a CLIP-like model, cut by the distance of its embeddings alone: nobody says what they are for."""

import argparse
import json
import sys

import torch
from shapes import CLASSES, Scenes, scenes
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import kcrprune


def tower() -> CLIPVisionModelWithProjection:
    """A small one."""
    shape = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "initializer_range": 0.08,
    }
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=32))


def embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Of length 1, (n, 32)."""
    return nn.functional.normalize(model(pixel_values=images).image_embeds, dim=1)


def train_(model: nn.Module, data: Scenes, steps: int) -> None:
    """Brings an image's embedding near that of its class and its place, which stand for the text of a caption."""
    texts = nn.Parameter(torch.randn(4 * len(CLASSES), 32))
    quarter = 2 * (data.boxes[:, ::2].mean(1) > 16).long() + (data.boxes[:, 1::2].mean(1) > 16).long()
    captions = 4 * data.classes + quarter
    optimizer = torch.optim.AdamW([*model.parameters(), texts], lr=1e-3)
    for _ in range(steps):
        picked = torch.randint(len(data), (32,))
        likeness = 10 * embeddings(model, data.images[picked]) @ nn.functional.normalize(texts, dim=1).T
        optimizer.zero_grad()
        nn.functional.cross_entropy(likeness, captions[picked]).backward()
        optimizer.step()


def neighbours(units: Tensor) -> Tensor:
    """(n,): which other image lies nearest to each."""
    return (units @ units.T).fill_diagonal_(-2).argmax(1)


@torch.no_grad()
def agreement(cut: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """How often both find the same image nearest to one."""
    first, second = (neighbours(embeddings(model, images)) for model in (cut, dense))
    return float((first == second).double().mean())


def run(steps: int = 500, count: int = 512, target: float = 0.6) -> dict[str, float]:
    """Figures after, with and without the training behind the cut."""
    torch.manual_seed(0)
    data, fresh, model = scenes(count, (32, 32)), scenes(count // 2, (32, 32), seed=1), tower()
    train_(model, data, steps)
    model.eval()
    found: dict[str, float] = {}
    for name, recover_steps in (("refit alone", 0), ("and 60 steps", min(60, steps))):
        result = kcrprune.compress(
            model,
            images=data.images.split(32),
            inputs=lambda batch: {"pixel_values": batch},
            outputs="image_embeds",
            part="vision_model",
            target_flops=target,
            recover_steps=recover_steps,
            calibration_images=256,
            score_images=256,
        )
        before, after = result.comparison.before, result.comparison.after
        assert before.macs
        assert after.macs
        found["share of the MACs"] = after.macs / before.macs
        found[f"distance, {name}"] = result.distances["image_embeds"]
        found[f"neighbours kept, {name}"] = agreement(result.model, model, fresh.images)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of the dense network's training")
    sys.stdout.write(json.dumps(run(parser.parse_args().steps), indent=2) + "\n")
