"""The machine that a run uses: its versions and its memory."""

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from kcrprune.graphs import runtime
from kcrprune.version import __version__

LIBRARIES: Final = ("torch", "timm", "torchvision", "safetensors", "onnx", "accelerate", "numpy")
HEEDED: Final = (  # variables that change how fast or how exactly is computed, or where
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "TIMM_FUSED_ATTN"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "NCCL_ALGO", "NCCL_PROTO", "KCRPRUNE_TRACEBACK"),
)


def machine_record(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the flags and the variables that a run used."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "kcrprune": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "device": str(device),
        "libraries": {name: version(name) for name in LIBRARIES} | runtime.installed(),
        "flags": {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        },
        "environment": {name: os.environ[name] for name in HEEDED if name in os.environ},
    }


def processor_name(device: torch.device) -> str:
    """What computes there, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux alone has that file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if platform.system() == "Windows":
        import psutil

        memory: Any = psutil.Process().memory_info()  # its fields are the system's
        return memory.peak_wset / 2**20
    from resource import RUSAGE_SELF, getrusage  # not on Windows; elsewhere psutil tells no peak

    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def peak_device_mib(device: torch.device) -> float | None:
    """Most memory of a GPU that this process's tensors have taken since `forget_peak`, in MiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Another run begins."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
