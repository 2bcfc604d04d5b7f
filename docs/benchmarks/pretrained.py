"""Networks with real pretraining, cut without labels: what their embeddings of CIFAR-10 at 224 px are worth afterwards.

    python docs/benchmarks/pretrained.py pack PACK --cache CACHE
    python docs/benchmarks/pretrained.py measure PACK --out RESULTS [--device cuda] [--limit SECONDS]

The first half fetches CLIP ViT-B/16's image tower, a Swin-B and the images, and writes them into pieces; the second
fetches nothing. A row is a network at a target: compressed on training images without labels, then looked at on test
images, before and after: distance and cosine of the embeddings, nearest class mean, neighbours and linear probe. Rows
lie below RESULTS/rows, each written when it is done; a second call goes on behind the last one, and inside a run
behind its last stage.
"""

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Final

import packed
import torch
import torch.nn.functional as F
from common import machine_facts
from embedded import Embedded, answers, nearness, paired
from int8_networks import PUBLISHED
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.atomic import write_atomically
from kcrprune.measure.tables import Table, markdown
from kcrprune.measure.timing import in_turn
from kcrprune.plan import Preprocessing

ROWS: Final = ("clip:0.7", "clip:0.5", "clip:0.35", "swin:0.7", "swin:0.5", "swin:0.35")
HELD_OUT: Final = 512  # images that a run sets aside, beside those that it calibrates on
WAYS: Final = ("class mean", "neighbours", "probe")
log = logging.getLogger("pretrained")


class TimeIsUpError(BaseException):
    """The limit has passed; nothing that catches errors is meant to stop it."""


@dataclass(frozen=True)
class Protocol:
    """What is the same for all rows."""

    calibration_images: int
    score_images: int
    reconstruct_epochs: int
    train_images: int  # that classes are found among
    test_images: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Bench:
    """Images as tensors on the device, and as files for the runs."""

    pack: Path
    out: Path
    device: torch.device
    protocol: Protocol
    workers: int
    images: dict[str, Tensor]  # (n, 3, 32, 32) of 0..255
    labels: dict[str, Tensor]

    @classmethod
    def open(cls, options: argparse.Namespace, protocol: Protocol) -> "Bench":
        """Reads the images; those that a run may look at become files."""
        found, device = packed.images(options.pack), torch.device(options.device)
        counts = dict(zip(packed.PARTS, (protocol.train_images, protocol.test_images), strict=True))
        files = options.out / "images" / "train"
        files.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(found["train"][0][: protocol.calibration_images + HELD_OUT]):
            if not (files / f"{number:05d}.png").exists():
                Image.fromarray(pixels).save(files / f"{number:05d}.png")
        images = {
            part: torch.from_numpy(pixels[: counts[part]].copy()).permute(0, 3, 1, 2).to(device)
            for part, (pixels, _) in found.items()
        }
        labels = {part: torch.from_numpy(truth[: counts[part]]).to(device) for part, (_, truth) in found.items()}
        return cls(options.pack, options.out, device, protocol, options.workers, images, labels)

    def checkpoint(self, name: str) -> Path:
        """The dense network as a file."""
        path = self.out / f"{name}.safetensors"
        if not path.exists():
            tensors = packed.network(self.pack, name)
            write_atomically(path, lambda part: save_file(tensors, part))
        return path

    def dense(self, name: str) -> dict[str, Tensor]:
        """The dense network's embeddings of each part."""
        path = self.out / f"{name}-dense-{self.protocol.train_images}-{self.protocol.test_images}.safetensors"
        if not path.exists():
            found = self.embeddings(kcrprune.load(self.checkpoint(name)), name)
            write_atomically(path, lambda part: save_tensors(found, part))
        return {part: value.to(self.device) for part, value in load_file(path).items()}

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, name: str, batch: int = 64) -> dict[str, Tensor]:
        """Of each part (n, d), in float32."""
        model = model.to(self.device).eval()
        return {
            part: torch.cat([model(self.enlarged(some, name)).float() for some in images.split(batch)])
            for part, images in self.images.items()
        }

    def enlarged(self, images: Tensor, name: str) -> Tensor:
        """What the network takes: bicubic as Pillow's, rounded to 256 levels, normalised."""
        told = preprocessing(self.checkpoint(name))
        size = told.input_size[1:]
        large = F.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        mean, std = (torch.tensor(each, device=self.device).view(-1, 1, 1) for each in (told.mean, told.std))
        return (large - mean) / std

    def compressed(self, name: str, target: float) -> Any:
        """The run, which goes on where it was stopped."""
        return kcrprune.compress(
            self.checkpoint(name),
            out=self.out / "runs" / f"{name}-{target:g}",
            recipe="no-train",
            target_flops=target,
            data=str(self.out / "images"),
            labels=False,
            calibration_images=self.protocol.calibration_images,
            score_images=self.protocol.score_images,
            reconstruct_epochs=self.protocol.reconstruct_epochs,
            batch_size=self.protocol.batch_size,
            seed=self.protocol.seed,
            workers=self.workers,
            device=str(self.device),
            **PUBLISHED[name].settings,
        )

    def row(self, name: str, target: float) -> dict[str, Any]:
        """All figures of a network at a target."""
        start = time.perf_counter()
        dense = self.dense(name)
        looked = time.perf_counter() - start
        run = self.compressed(name, target)
        model = kcrprune.load(run.folder)
        pruned = self.embeddings(model, name)
        times = {stage.stage: [stage.seconds, stage.algebra_seconds, stage.passes] for stage in run.comparison.stages}
        return {
            "MACs": run.comparison.after.macs / run.comparison.before.macs,
            "seconds": sum(stage.seconds for stage in run.comparison.stages),
            "seconds of dense embeddings": looked,
            "seconds, of algebra, and passes of each stage": times,
            "nearness": nearness(pruned["validation"], dense["validation"], dense["train"].mean(0)),
            "named rightly": self.compared(dense, pruned),
            "milliseconds": self.latencies(name, model),
        }

    def compared(self, dense: dict[str, Tensor], pruned: dict[str, Tensor]) -> dict[str, Any]:
        """Each way's figures; with `, dense among` the images to look among are embedded by the dense network."""

        def found(among: Tensor, images: Tensor) -> dict[str, Tensor]:
            return answers(Embedded(among, self.labels["train"], images, self.labels["validation"]))

        before = found(dense["train"], dense["validation"])
        after = found(pruned["train"], pruned["validation"])
        mixed = found(dense["train"], pruned["validation"])
        both = {way: paired(after[way], before[way]) for way in WAYS}
        return both | {f"{way}, dense among": paired(mixed[way], before[way]) for way in WAYS}

    def latencies(self, name: str, model: nn.Module) -> dict[str, list[float]]:
        """Milliseconds of the dense and the pruned network by batch size and precision."""
        networks = [kcrprune.load(self.checkpoint(name)).to(self.device), model.to(self.device)]
        cuda = self.device.type == "cuda"
        found = {}
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            for batch in (1, 64) if cuda else (1,):
                images = torch.randn(batch, *self.enlarged(self.images["train"][:1], name).shape[1:])
                images = images.to(self.device, dtype)
                calls = [(each.to(dtype), images) for each in networks]
                times = [median(own) for own in in_turn(calls, seconds=0, fewest=20)]
                found[f"{dtype}, batch {batch}"] = times
        return found


@cache
def preprocessing(checkpoint: Path) -> Preprocessing:
    """How a file's network wants its images."""
    return open_model(checkpoint).preprocessing


def once(path: Path, protocol: Protocol, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in `path`, made where it is not there or of another protocol."""
    if path.exists() and (row := json.loads(path.read_text()))["protocol"] == asdict(protocol):
        return row
    row = make() | {"protocol": asdict(protocol)}
    write(path, row)
    return row


def write(path: Path, data: Any) -> None:
    """JSON that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_text(json.dumps(data, indent=1)), replace=True)


def measure(options: argparse.Namespace) -> None:
    """The rows that are asked for, in order, until the limit; the table after each."""
    protocol = Protocol(**{name: getattr(options, name) for name in Protocol.__dataclass_fields__})
    if options.limit:
        signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, options.limit)
    rows: dict[str, Any] = {}
    try:
        bench = Bench.open(options, protocol)
        for asked in options.rows:
            name, _, target = asked.partition(":")
            log.info("%s", asked)
            try:
                path = options.out / "rows" / f"{name}-{target}.json"
                rows[asked] = once(path, protocol, lambda: bench.row(name, float(target)))  # noqa: B023
            except Exception as error:  # of any kind: the other rows are still to come
                log.exception("%s failed", asked)
                rows[asked] = {"failure": f"{type(error).__name__}: {error}"}
            tell(options, rows)
    except TimeIsUpError:
        log.info("the limit has passed; %d rows are whole", len(rows))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _time_is_up(*_: object) -> None:
    raise TimeIsUpError


def tell(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Writes figures and table."""
    cuda = options.device.startswith("cuda")
    facts = machine_facts() | {"device": torch.cuda.get_device_name() if cuda else "CPU"}
    write(options.out / "pretrained.json", {"rows": rows, "circumstances": facts})
    text = to_markdown(rows) + "\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n"
    write_atomically(options.out / "pretrained.md", lambda part: part.write_text(text), replace=True)
    log.info("%s", text)


def to_markdown(rows: dict[str, Any]) -> str:
    """One line a row; differences in points with their standard errors."""
    headings = (
        "row",
        "MACs",
        "distance",
        "cosine",
        "centred cosine",
        *WAYS,
        "neighbours, dense among",
        "run",
        "passes",
    )
    return markdown(Table("Pretrained networks", headings, tuple(_cells(name, row) for name, row in rows.items())))


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "failure" in row:
        return (name, row["failure"], *("-",) * 9)
    near, rightly = row["nearness"], row["named rightly"]
    passes = sum(each[2] or 0 for each in row["seconds, of algebra, and passes of each stage"].values())
    points = [
        f"{found['dense']:.2f} to {found['pruned']:.2f} % ({found['difference']:+.2f} ± {found['error']:.2f})"
        for found in (rightly[way] for way in (*WAYS, "neighbours, dense among"))
    ]
    shown = (f"{near[key]:.4f}" for key in ("distance", "cosine", "centred cosine"))
    return (name, f"{row['MACs']:.4f}", *shown, *points, f"{row['seconds']:.0f} s", f"{passes:.0f}")


def pack(options: argparse.Namespace) -> None:
    """Fetches, and writes the pieces."""
    counts = options.train_images, options.test_images
    packed.pack(options.pack, options.cache, options.networks, counts, int(1e6 * options.piece))


def parser() -> argparse.ArgumentParser:
    """Both halves' options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    halves = found.add_subparsers(required=True)
    packing, measuring = halves.add_parser("pack"), halves.add_parser("measure")
    for half in (packing, measuring):
        half.add_argument("pack", type=Path, help="folder of the pieces")
        half.add_argument("--train-images", type=int, default=10_000)
        half.add_argument("--test-images", type=int, default=4000)
    packing.set_defaults(run=pack)
    packing.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    packing.add_argument("--networks", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    packing.add_argument("--piece", type=float, default=55, help="MB of a piece")
    measuring.set_defaults(run=measure)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--rows", nargs="+", default=ROWS, help="NETWORK:TARGET, in order of worth")
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--limit", type=float, help="seconds after which it ends with what it has")
    measuring.add_argument("--workers", type=int, default=0, help="processes that load a run's images")
    measuring.add_argument("--calibration-images", type=int, default=4096)
    measuring.add_argument("--score-images", type=int, default=1024)
    measuring.add_argument("--reconstruct-epochs", type=int, default=0)
    measuring.add_argument("--batch-size", type=int, default=32)
    measuring.add_argument("--seed", type=int, default=42)
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parser().parse_args()
    options.run(options)
