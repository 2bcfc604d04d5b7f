"""What the benchmark scripts share: their networks, links to some of the images, where a run was made (no torch)."""

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kcrprune.version import __version__

WEIGHTS = Path(__file__).parent / "weights"
LIBRARIES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu")  # those of them that are there


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What a script is told that measures one of the networks of this folder at one target."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", default="deit", choices=["deit", "swin", "tiny_vit"])
    parser.add_argument("--target", type=float, default=0.35)
    return parser


def parser_of_several(description: str | None, targets: Sequence[float]) -> argparse.ArgumentParser:
    """What a script is told that measures networks of this folder at several targets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=["deit", "swin", "tiny_vit"])
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=list(targets))
    return parser


def first_images(data: Path, folder: Path, count: int) -> Path:
    """An image folder of links to all training images and to the first `count` test images of `data`.

    `folder` gets the count behind its name.
    """
    folder = folder.with_name(f"{folder.name}-{count}")
    if not folder.exists():
        for path in sorted((data / "validation").glob("*/*.png"), key=lambda path: path.name)[:count]:
            link = folder / "validation" / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        (folder / "train").symlink_to(data / "train")
    return folder


def machine_facts(further: Sequence[str] = ()) -> dict[str, Any]:
    """Date, machine, threads and versions; `further` names libraries that need not be installed."""
    versions = [f"kcrprune {__version__}"]
    for name in (*LIBRARIES, *further):
        if there(name):
            versions.append(f"{name} {version(name)}")
        elif name in further:
            versions.append(f"{name} not installed")
    return {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": ", ".join(versions),
    }


def plans_of(decisions: Mapping[str, Any]) -> dict[str, float]:
    """The held-out distances that a run has decided by: at the first look at both plans, or of the one that was cut."""
    looked = decisions.get("selection", {}).get("distance")
    return (
        {name: looked[name] for name in ("scores", "search")} if looked else decisions["plans"]["held_out_distillation"]
    )


def there(name: str) -> bool:
    """Whether a package is installed."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
