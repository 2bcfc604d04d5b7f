"""The machine that a run uses: its versions and its memory."""

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

from kcrprune.graphs import runtime
from kcrprune.version import __version__

LIBRARIES = ("torch", "timm", "torchvision", "safetensors", "fvcore", "onnx", "accelerate", "numpy")


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
        "libraries": {name: version(name) for name in LIBRARIES} | runtime.installed(),
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
