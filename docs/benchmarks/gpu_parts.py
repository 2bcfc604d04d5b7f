"""The parts of gpu.py, one a process; each writes FOLDER/PART.json as it goes.

    python docs/benchmarks/gpu_parts.py FOLDER PART [--small] [--data IMAGES] [--steps N]

machine   the card, its memory's and its multipliers' rates, the method's decompositions: the roofline of what follows
same      the tests marked gpu; one command on CPU and GPU in fp32: plans, channels that differ, outputs
kernels   attention by query and value widths: which kernel is taken, and times, padded to one width as well
big       ViT-S, ViT-B, Swin-T at 224 px with random weights, `no-train`: seconds, passes and algebra of each stage
latency   dense and pruned networks of `big`: batch 1, 8, 64, eager and as a CUDA graph
laws      the tests of the laws, with all tensors on the device
steps     steps of search and recovery beside a plain step of fine-tuning and the teacher's pass
ort       dense and pruned networks of `big` in ONNX Runtime (named only)
search    the network of `same` at 0.25: long selection against recovery alone at equal passes, three seeds, on the
          images of `--data` (generated ones without); named only
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Final

import timm
import torch
import torch.nn.functional as F
from common import WEIGHTS, machine_facts
from gpu import write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kcrprune
from kcrprune.events import Event, StepDone
from kcrprune.graphs import open_onnx
from kcrprune.plan import ChannelPlan

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
REAL: Final = WEIGHTS / "deit_cifar10.safetensors"
BIG: Final = ("vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
TINY: Final = ("vit_tiny_patch16_224",)
BATCHES: Final = (1, 8, 64) if DEVICE == "cuda" else (1,)
WIDTHS: Final = ((64, 64), (32, 32), (40, 40), (32, 48), (64, 32))  # of a head's query and value
BACKENDS: Final = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


class Part(dict):
    """What a part has found; written at every change, so that a part that is ended leaves what it has."""

    def __init__(self, out: Path, name: str, *, small: bool) -> None:
        super().__init__()
        self.out, self.file, self.small = out, out / f"{name}.json", small
        self.data: Path | None = None  # an image folder, and steps, of `search`
        self.steps = 2000
        self.networks = TINY if small else BIG

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        write(self.file, self)

    def compressed(self, name: str, checkpoint: Path, **settings: Any) -> dict[str, Any]:
        """Stages of one run, its device's peak memory, and where it lies."""
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        few = {"calibration_images": 64, "score_images": 32, "generated_images": 256} if self.small else {}
        run = kcrprune.compress(checkpoint, out=self.out / name, fresh=True, **settings | few)
        stages = {
            time.stage: {"seconds": time.seconds, "passes": time.passes, "algebra": time.algebra_seconds}
            for time in run.comparison.stages
        }
        peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None
        return {"device": settings.get("device", DEVICE), "device_mib": peak, "stages": stages}


def milliseconds(call: Callable[[], object], runs: int = 20) -> float:
    """Median time of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return round(median(times), 4)


def wait() -> None:
    """Until the device has nothing to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine(found: Part) -> None:
    """Ceilings."""
    found["facts"] = machine_facts()
    if DEVICE == "cuda":
        card = torch.cuda.get_device_properties(0)
        memory = card.total_memory / 2**30
        found["card"] = {"name": card.name, "GiB": memory, "capability": f"{card.major}.{card.minor}"}
    size = 512 if found.small else 8192
    stream = torch.randn(2**20 if found.small else 2**28, device=DEVICE)
    other = torch.empty_like(stream)
    found["copy GB/s"] = 8e-6 * stream.numel() / milliseconds(lambda: other.copy_(stream))
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        x = torch.randn(size, size, device=DEVICE, dtype=dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"product TFLOP/s {dtype}{' tf32' if tf32 else ''}"] = 2e-9 * size**3 / milliseconds(lambda x=x: x @ x)
    tall = torch.randn(10 * size, size // 4, device=DEVICE, dtype=torch.float64)
    gram = tall.T @ tall
    found["algebra ms"] = {
        f"Gram matrix of {tuple(tall.shape)}": milliseconds(lambda: tall.T @ tall, 3),
        f"Cholesky of {len(gram)}": milliseconds(lambda: torch.linalg.cholesky(gram), 3),
        f"eigh of {len(gram) // 2}": milliseconds(
            lambda: torch.linalg.eigh(gram[: len(gram) // 2, : len(gram) // 2]), 3
        ),
    }


def same(found: Part) -> None:
    """One command on two devices; what the tests that need a GPU say."""
    tests = Path(__file__).parents[2] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
    if DEVICE == "cuda":
        found["tests"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout[-600:]
    settings = {"recipe": "no-train", "target_flops": 0.5, "precision": "fp32", "reconstruct_epochs": 1}
    devices = tuple(dict.fromkeys(("cpu", DEVICE)))
    for device in devices:
        found[device] = found.compressed(f"same-{device}", REAL, device=device, **settings)
    plans = [ChannelPlan.model_validate_json((found.out / f"same-{d}" / "plan.json").read_text()) for d in devices]
    found["kept channels that differ"] = differing(plans[0], plans[-1])
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, last = (kcrprune.load(found.out / f"same-{device}")(images) for device in (devices[0], devices[-1]))
    found["relative squared distance"] = float((first - last).square().sum() / first.square().sum())
    found["same answers"] = float((first.argmax(1) == last.argmax(1)).float().mean())


def laws(found: Part) -> None:
    """Whether they hold there."""
    tests = Path(__file__).parents[2] / "tests" / "test_laws.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--on", DEVICE, str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found["said"] = done.stdout[-3000:] + done.stderr[-500:]


def differing(first: ChannelPlan, second: ChannelPlan) -> int:
    """How many kept channels are in one of two plans alone."""
    kept = [
        {
            (group.site, group.axis, head, channel)
            for group in plan.groups
            for head, channels in zip(group.kept_heads, group.channels, strict=True)
            for channel in channels
        }
        for plan in (first, second)
    ]
    return len(kept[0] ^ kept[1])


def kernels(found: Part) -> None:
    """Attention, as torch chooses, by kernel, and padded to one width."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for tokens, batch, biased in ((197, 64, False), (49, 1024, True)):
        for query, value in WIDTHS:
            shape = (2 if found.small else batch, 6, tokens)
            q, k = (torch.randn(*shape, query, device=DEVICE, dtype=dtype) for _ in range(2))
            v = torch.randn(*shape, value, device=DEVICE, dtype=dtype)
            bias = torch.randn(1, 6, tokens, tokens, device=DEVICE, dtype=dtype) if biased else None
            row: dict[str, Any] = {"choice": int(torch._fused_sdp_choice(q, k, v, bias))}
            row["ms"] = milliseconds(lambda a=(q, k, v, bias): F.scaled_dot_product_attention(*a))
            row["padded ms"] = milliseconds(lambda a=(q, k, v, bias): padded(*a)) if query != value else None
            row |= {name: on_kernel(name, (q, k, v, bias)) for name in BACKENDS}
            found[f"{tokens} tokens, {query}/{value}{', bias' if biased else ''}"] = row


def padded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with the narrower of query and value brought to the other's width, and back."""
    width = max(q.shape[-1], v.shape[-1])
    wide = [F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*wide, bias, scale=q.shape[-1] ** -0.5)[..., : v.shape[-1]]


def on_kernel(name: str, arguments: tuple[Any, ...]) -> float | None:
    """Milliseconds on one kernel; None where it does not take these."""
    try:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return milliseconds(lambda: F.scaled_dot_product_attention(*arguments), 5)
    except RuntimeError:
        return None


def dense(found: Part, name: str) -> Path:
    """A network of timm with random weights, as a file."""
    path = found.out / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), path)
    return path


def big(found: Part) -> None:
    """Whole runs at 224 px."""
    for name in found.networks:
        settings = {"recipe": "no-train", "reconstruct_epochs": 1, "calibration_images": 1024, "score_images": 256}
        found[name] = found.compressed(f"big-{name}", dense(found, name), device=DEVICE, **settings)


def pairs(found: Part) -> dict[str, list[nn.Module]]:
    """Dense and pruned networks of `big`, as far as that came."""
    there = [name for name in found.networks if (found.out / f"big-{name}" / "run.json").exists()]
    return {
        name: [kcrprune.load(path).to(DEVICE) for path in (dense(found, name), found.out / f"big-{name}")]
        for name in there
    }


def latency(found: Part) -> None:
    """Milliseconds of dense and pruned networks."""
    for name, networks in pairs(found).items():
        rows = {}
        for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
            for batch in BATCHES:
                images = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=dtype)
                with torch.inference_mode():
                    calls = [partial(network.to(dtype), images) for network in networks]
                    rows[f"{dtype}, batch {batch}"] = {
                        "eager (dense, pruned)": [milliseconds(call) for call in calls],
                        "graph (dense, pruned)": [milliseconds(captured(call).replay) for call in calls]
                        if DEVICE == "cuda"
                        else None,
                    }
        found[name] = rows


def captured(call: Callable[[], object]) -> Any:
    """A call as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def steps(found: Part) -> None:
    """Times between two steps, repeatably too, beside a plain step of the same network on as many images."""
    count, batch = (6, 4) if found.small else (40, 64)
    for name, label in ((n, n + way) for n in found.networks[:2] for way in ("", "-deterministic")):
        stamps: dict[str, list[float]] = {}

        def listen(event: Event, stamps: dict[str, list[float]] = stamps) -> None:
            if isinstance(event, StepDone):
                stamps.setdefault(event.stage, []).append(time.perf_counter())

        settings = {"search_steps": count, "recover_steps": count, "batch_size": batch}
        settings |= {"search_weight_lr": 1e-5, "search_split": 0.7}  # weights and gates in turns, a step of each
        settings |= {"calibration_images": 64, "score_images": 32, "workers": min(12, os.cpu_count() or 1)}
        repeatable = label.endswith("deterministic")
        settings |= {"deterministic": repeatable, "device": DEVICE, "listener": listen}
        found.compressed(f"steps-{label}", dense(found, name), **settings)
        gaps = {
            stage: 1e3 * (times[-1] - times[len(times) // 4]) / (len(times) - 1 - len(times) // 4)
            for stage, times in stamps.items()
            if stage in ("search", "recover")
        }
        found[label] = plain(kcrprune.load(dense(found, name)).to(DEVICE), batch) | {"ms of a step": gaps}


def plain(model: nn.Module, batch: int) -> dict[str, float]:
    """A step of fine-tuning, and a pass as a teacher's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)

    def forward() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            return model(images)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward().float(), torch.zeros(batch, dtype=torch.long, device=DEVICE)).backward()
        optimizer.step()

    with torch.no_grad():
        teacher = milliseconds(forward, 5)
    return {"teacher's pass ms": teacher, "plain step ms": milliseconds(step, 5)}


def ort(found: Part) -> None:
    """ONNX Runtime, with the provider that the device asks for."""
    for name in found.networks:
        for side, path in (("dense", dense(found, name)), ("pruned", found.out / f"big-{name}")):
            if not path.exists():
                continue
            file = found.out / f"{name}-{side}.onnx"
            kcrprune.export_onnx(path, file)
            graph = open_onnx(file)
            graph.device = DEVICE
            found[f"{name}, {side}"] = {
                f"batch {batch} ms": milliseconds(partial(graph, torch.randn(batch, 3, 224, 224)), 10)
                for batch in BATCHES
            }


def search(found: Part) -> None:
    """Selection and recovery, against recovery alone at equal passes: three seeds, several processes at once."""
    count, seeds = (4, 1) if found.small else (found.steps, 3)
    runs = [(seed, weight) for weight in (None, 0.1, 0.0, 1.0) for seed in range(seeds)]  # None: no selection
    with ProcessPoolExecutor(2 if found.small else 6, get_context("spawn")) as pool:
        rows = {pool.submit(one_search, found.out, run, count, found.data, found.small): run for run in runs}
        for row in as_completed(rows):
            seed, weight = rows[row]
            found[f"seed {seed}, " + ("recovery alone" if weight is None else f"kernel weight {weight:g}")] = (
                row.result()
            )


def one_search(
    out: Path,
    run: tuple[int, float | None],
    count: int,
    data: Path | None,
    small: bool,  # noqa: FBT001 (handed to a process)
) -> dict[str, Any]:
    """One of them, and what it decided and reached."""
    seed, weight = run
    settings: dict[str, Any] = {"target_flops": 0.25, "seed": seed, "recover_steps": count, "workers": 0}
    if weight is None:
        settings["recover_steps"] = 3 * count  # a step of selection is two
    else:
        settings |= {"search_steps": count, "search_weight_lr": 2e-5, "search_split": 0.7, "kernel_weight": weight}
    if data:
        settings["data"] = str(data)
    part = Part(out, "one", small=small)
    began, row = time.monotonic(), part.compressed(f"search-{seed}-{weight}", REAL, device=DEVICE, **settings)
    folder = out / f"search-{seed}-{weight}"
    report, record = (json.loads((folder / name).read_text()) for name in ("report.json", "run.json"))
    accuracy = {side: report[side]["accuracy"] for side in ("before", "after")}
    return row | {"run_seconds": time.monotonic() - began, "accuracy": accuracy, "decisions": record["decisions"]}


PARTS: Final = (machine, same, laws, kernels, big, latency, steps, ort, search)


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    part = next(part for part in PARTS if part.__name__ == options.part)
    found = Part(options.out, options.part, small=options.small)
    found.data, found.steps = options.data, options.steps
    part(found)


if __name__ == "__main__":
    main()
