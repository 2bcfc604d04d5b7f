"""The whole path, offline: trains a small ViT on scikit-learn's digits, compresses it, exports it, verifies it."""

from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kcrprune.artifact.artifact import save_model
from kcrprune.atomic import make_folder_atomically
from kcrprune.config import load_config
from kcrprune.errors import ConfigError
from kcrprune.events import Listener, StageEnded, StageStarted, StepDone
from kcrprune.families import build
from kcrprune.graphs import ExportResult
from kcrprune.pipeline.compress import RunResult, compress
from kcrprune.pipeline.verbs import export
from kcrprune.plan import Architecture, Preprocessing
from kcrprune.run import folder as folders
from kcrprune.run.folder import Asked
from kcrprune.training.precision import require_one_process
from kcrprune.training.randomness import seeded

ASKED: Final = Asked(checkpoint="the demo", images="digits", settings={})
EPOCHS: Final = 25
TRAIN_IMAGES: Final = 1437  # four fifths of the 1,797 digits
SIZE: Final = 16  # the 8 x 8 digits, enlarged: 17 tokens of 4 x 4
ARCHITECTURE: Final = Architecture(
    family="vit",
    name="vit_tiny_patch16_224",
    arguments={
        "img_size": SIZE,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 10,
    },
)
PREPROCESSING: Final = Preprocessing(
    input_size=(3, SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", source="the demo"
)


def demo(out: Path | None, listener: Listener) -> tuple[RunResult, ExportResult]:
    """Writes digits as images, a dense checkpoint, a run and an ONNX file into a new folder.

    A demo that was stopped goes on where it was.
    """
    require_one_process()
    with folders.taken(folders.candidates(out, "demo-0.5", ASKED, fresh=False)) as folder:
        ASKED.write(folder)
        if not (folder / "digits").exists():
            make_folder_atomically(folder / "digits", _write_digits)
        if not (folder / "dense.safetensors").exists():
            with seeded(0, "demo", 0, "dense network"):
                _train(folder / "dense.safetensors", folder / "digits" / "train", listener)
        config = load_config(
            "default",
            flags={"data": str(folder / "digits"), "target_flops": 0.5, "hflip": 0.0, "device": "cpu", "workers": 0},
        )
        result = compress(folder / "dense.safetensors", config, folder / "run", listener)
        exported = export(result.folder, None, listener)
    rmtree(folder / folders.STORE)
    return result, exported


def _write_digits(folder: Path) -> None:
    """Saves the digits as PNG, one folder a class, in a fixed order: the last fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError('the demo needs scikit-learn for its images: pip install "kcrprune[demo]"') from None
    pixels, classes = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    for position, index in enumerate(order):
        part = "train" if position < TRAIN_IMAGES else "validation"
        path = folder / part / str(classes[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digit = (pixels[index].reshape(8, 8) * 255 / 16).round().astype("uint8")
        Image.fromarray(digit).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB").save(path)


def _read_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, SIZE, SIZE) in [-1, 1] and labels (n,)."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = [torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8) for path in paths]
    images = torch.stack(pixels).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([int(path.parent.name) for path in paths])


def _train(path: Path, folder: Path, listener: Listener) -> None:
    """Trains the dense network: AdamW with a one-cycle rate, shifts by a pixel as augmentation."""
    images, labels = _read_digits(folder)
    model = build(ARCHITECTURE).train()
    batches = len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * batches)
    start = perf_counter()
    listener(StageStarted("train the dense network", EPOCHS))
    for epoch in range(EPOCHS):
        loss = torch.zeros(())
        for picked in torch.randperm(len(images))[: batches * 64].split(64):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(images[picked].roll(shift, (2, 3))), labels[picked], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        listener(StepDone("train the dense network", epoch + 1, {"loss": float(loss.detach())}))
    listener(StageEnded("train the dense network", perf_counter() - start))
    save_model(
        path,
        model.eval(),
        architecture=ARCHITECTURE,
        plan=None,
        preprocessing=PREPROCESSING,
        class_names=tuple("0123456789"),
        record={},
    )
