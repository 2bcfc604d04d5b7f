"""Trains the small ViT, distilled DeiT and Swin that the benchmarks compress: CIFAR-10, 32 px, PyTorch and timm.

    python docs/benchmarks/train.py swin --data CACHE/cifar10 --teacher VIT.safetensors --out swin_cifar10.safetensors

The teacher is a ViT fine-tuned on CIFAR-10 (finetune_vit.py makes one). Its logits on the un-augmented training images
are computed once and kept in --logits, so the students train at the cost of their own forward and backward passes.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from finetune_vit import vit, vit_inputs
from images import accuracy, load_images, normalised
from safetensors.torch import load_file, save_file
from timm.layers.config import set_fused_attn
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
log = logging.getLogger("train")


def inputs_of(images: Tensor) -> Tensor:
    """Images in 0..255 as the small networks take them."""
    return normalised(images, CIFAR_MEAN, CIFAR_STD)


@torch.inference_mode()
def teacher_logits(checkpoint: Path, images: Tensor, cache: Path) -> Tensor:
    """Logits (n, 10) of the ViT on all images, prepared as it was trained; from `cache` if that exists."""
    if cache.exists():
        return torch.from_numpy(np.load(cache)["logits"])
    model = vit(load_file(checkpoint)).eval()
    logits, start = [], time.monotonic()
    for number, batch in enumerate(images.split(100)):
        logits.append(model(vit_inputs(batch)))
        if number % 20 == 0:
            log.info("teacher: %d images, %.0f s", number * 100, time.monotonic() - start)
    np.savez(cache, logits=torch.cat(logits).numpy())
    return torch.cat(logits)


ARCHITECTURES = {
    "deit": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 32,
            "depths": (2, 2, 6),
            "num_heads": (1, 2, 4),
            "drop_path_rate": 0.0,
            "num_classes": 10,
        },
    ),
    "tiny_vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10},
    ),
}


def start_well_(model: Any, images: Tensor) -> None:
    """A better start for a short training: patch filters that whiten real patches, sine-cosine positions for a ViT."""
    projection = model.patch_embed.proj
    size = projection.kernel_size[0]
    patches = inputs_of(images).unfold(2, size, size).unfold(3, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)  # (patches, 3 size^2)
    energies, directions = torch.linalg.eigh(torch.cov(patches.T))
    filters = (directions / (energies + 1e-2).sqrt()).T.flip(0).reshape(-1, 3, size, size)
    count = min(len(filters), len(projection.weight))
    with torch.no_grad():
        projection.weight[:count] = filters[:count] / math.sqrt(count)
        if hasattr(model, "pos_embed"):
            grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
            positions = build_sincos2d_pos_embed(grid, dim=model.embed_dim)
            model.pos_embed[:, prefix:] = 0.2 * positions


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for the rest."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inside = weight.ndim == 2 and not name.startswith("head") and "bias_table" not in name
        (matrices if inside else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images and shifts each by up to 4 pixels (reflected borders)."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    shifts = torch.randint(0, 9, (len(images), 2), generator=generator)
    rows = shifts[:, :1] + torch.arange(32)  # (n, 32)
    columns = shifts[:, 1:] + torch.arange(32)
    return padded[torch.arange(len(images)).view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def loss_of(outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the labels and divergence from the teacher; a distilled DeiT learns each with its own head."""
    by_labels, by_teacher = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    divergence = F.kl_div(by_teacher.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    return 0.5 * F.cross_entropy(by_labels, labels, label_smoothing=0.05) + 0.5 * divergence


def forward_bfloat16(model: nn.Module, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Outputs in float32 of a forward pass in bfloat16; the weights stay float32 and get their gradients.

    With timm's plain attention this is twice as fast on a CPU that multiplies bfloat16; with fused attention or under
    autocast it is slower than float32.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors.items()}
    outputs = torch.func.functional_call(model, halves, inputs.bfloat16())
    return tuple(part.float() for part in outputs) if isinstance(outputs, tuple) else outputs.float()


def train_(model: nn.Module, images: Tensor, labels: Tensor, teacher: Tensor, arguments: argparse.Namespace) -> int:
    """Trains for --epochs, or for --minutes if that is shorter, and returns the number of steps.

    The rate descends with whichever of the two is nearer its end.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = optimizers(model, arguments.lr)
    steps = int(arguments.epochs * len(images) / arguments.batch_size)
    start, step, average = time.monotonic(), 0, 0.0
    model.train()
    while (progress := max(step / steps, (time.monotonic() - start) / (60 * arguments.minutes))) < 1:
        rate = arguments.lr * min((step + 1) / 100, 1.0, (1 - progress) / 0.8)
        picked = torch.randint(0, len(images), (arguments.batch_size,), generator=generator)
        inputs = inputs_of(augmented(images[picked], generator))
        loss = loss_of(forward_bfloat16(model, inputs), labels[picked], teacher[picked])
        loss.backward()
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        average += (loss.item() - average) / min(step, 50)
        if step % 50 == 0:
            log.info(
                "step %d of %d, loss %.3f, rate %.5f, %.0f s", step, steps, average, rate, time.monotonic() - start
            )
    return step


def main() -> None:
    """Trains one network and saves it as float16 with its recipe and accuracy in the header."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(ARCHITECTURES))
    parser.add_argument("--data", type=Path, required=True, help="the image folder that fetch.py makes")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="safetensors file of the ViT fine-tuned on CIFAR-10"
    )
    parser.add_argument(
        "--logits", type=Path, default=Path("teacher_logits.npz"), help="where the teacher's logits are kept"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall time after which the training has ended")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    set_fused_attn(enable=False)

    images, labels = load_images(arguments.data / "train")
    teacher = teacher_logits(arguments.teacher, images, arguments.logits)
    name, options = ARCHITECTURES[arguments.network]
    model: Any = timm.create_model(name, **options)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    start_well_(model, images[:2000])
    steps = train_(model, images, labels, teacher, arguments)
    weights = {key: value.half() for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    top1 = accuracy(model, inputs_of, *load_images(arguments.data / "validation"))  # of what is saved
    log.info("top-1 on the test images: %.2f %%", top1)
    save(weights, arguments, steps * arguments.batch_size / len(images), top1)


def save(weights: dict[str, Tensor], arguments: argparse.Namespace, epochs: float, top1: float) -> None:
    """Writes weights under timm's keys; the header tells architecture, preprocessing, recipe and accuracy."""
    name, options = ARCHITECTURES[arguments.network]
    preprocessing = {
        "input_size": (3, 32, 32),
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 10,
    }
    limit = "" if math.isinf(arguments.minutes) else f" of {arguments.epochs:g} (limit: {arguments.minutes:g} min)"
    about = (
        f"Trained on CIFAR-10 by docs/benchmarks/train.py: {epochs:.2f} epochs{limit}, batch {arguments.batch_size}, "
        f"rate {arguments.lr}, seed {arguments.seed}, Muon for matrices and AdamW for the rest, flips, shifts of up "
        "to 4 px; half cross-entropy (smoothing 0.05), half distillation from a DINOv2-started ViT-S at 56 px "
        f"(85.8 %). Top-1 on the 10,000 test images: {top1:.2f} %."
    )
    header = {  # the names that timm gives these things in a config.json
        "architecture": name,
        "model_args": json.dumps(options),
        "pretrained_cfg": json.dumps(preprocessing),
        "top1": f"{top1:.2f}",
        "about": about,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, arguments.out, metadata=header)


if __name__ == "__main__":
    main()
