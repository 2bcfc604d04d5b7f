"""The machine that a run uses: its versions and its memory."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import torch

from kcrprune.version import __version__

LIBRARIES = ("torch", "timm", "torchvision", "safetensors", "fvcore", "onnx", "onnxruntime", "accelerate", "numpy")


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if platform.system() == "Darwin" else 1024)
