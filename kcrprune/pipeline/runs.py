"""Run folders: where a run's files go, how they appear all at once, and which run is the newest."""

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import tomli_w
import torch

from kcrprune.config import RunConfig
from kcrprune.errors import CheckpointError, OutputExistsError
from kcrprune.version import __version__

RUNS = Path("kcrprune-runs")
MODEL, RECORD = "model.safetensors", "run.json"
LIBRARIES = ("torch", "timm", "torchvision", "safetensors", "fvcore", "onnx", "onnxruntime", "accelerate", "numpy")


def choose_folder(out: Path | None, checkpoint: Path, target: float) -> Path:
    """The folder that was asked for, or a free one named after the checkpoint and the target.

    OutputExistsError where the asked one is taken; an empty folder is free.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputExistsError(
                f"{out} is already there and not empty; choose another --out, nothing is overwritten"
            )
        return out
    name = f"{checkpoint.resolve().stem}-{target:g}"
    candidates = (RUNS / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists())


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A working folder that takes the name `folder` when the block succeeds and vanishes when it fails."""
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise OutputExistsError(f"cannot write to {folder.parent}: {error.strerror}; choose another --out") from None
    try:
        yield working
        if folder.is_dir():
            folder.rmdir()  # it was empty when the run began; still so, or this fails
        working.chmod(0o777 & ~_umask())
        working.rename(folder)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def newest_model(below: Path) -> Path:
    """The model of the newest finished run below a folder; CheckpointError where there is none."""
    found = [record.parent / MODEL for record in below.rglob(RECORD) if (record.parent / MODEL).is_file()]
    if not found:
        raise CheckpointError(f"no run of kcrprune lies below {below.resolve()}; name a model, or run compress first")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))


def to_toml(config: RunConfig) -> str:
    """A configuration as the TOML file that repeats it; options that are unset are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def machine_record() -> dict[str, Any]:
    """The machine and the versions that a run used."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "kcrprune": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "libraries": {name: version(name) for name in LIBRARIES},
        "command": " ".join(["kcrprune", *sys.argv[1:]]),
    }


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if platform.system() == "Windows":
        import psutil

        memory: Any = psutil.Process().memory_info()  # its fields are the system's
        return memory.peak_wset / 2**20
    from resource import RUSAGE_SELF, getrusage  # not on Windows; elsewhere psutil tells no peak

    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def write_json(path: Path, data: Any) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_log(path: Path, histories: Mapping[str, list[dict[str, float]]]) -> None:
    """One line of JSON for every training step; null for what is no finite number, which JSON does not have."""
    lines = [
        json.dumps({"stage": stage} | {name: value if isfinite(value) else None for name, value in row.items()})
        for stage, rows in histories.items()
        for row in rows
    ]
    path.write_text("".join(line + "\n" for line in lines))
