"""The device that a run computes on, and in which precision."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kcrprune.errors import ConfigError


def open_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerator on the asked device; `auto` is a GPU where there is one, in bf16, else the CPU in fp32.

    ConfigError names a device that this machine lacks.
    """
    chosen = _available_device(device)
    if precision == "auto":
        precision = "bf16" if chosen.startswith("cuda") else "fp32"
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one process may ask for another device
    if chosen.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    accelerator = Accelerator(cpu=chosen == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    if accelerator.num_processes > 1:  # nothing shares the images out yet, so sums would count them twice
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched, and a run is one; start it without them"
        )
    return accelerator


def _available_device(device: str) -> str:
    count = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if count else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(f"device {device!r} is not here (this machine has {count} CUDA devices); use auto or cpu")
    return device
