"""The device that a run computes on, and in which precision."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from kcrprune import processes
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError

SIZES: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what launchers set


def open_accelerator(device: str, precision: str, *, shared: bool = False) -> Accelerator:
    """Accelerator on the asked device; `auto` is a GPU where one works, in bf16 where it can, else the CPU in fp32.

    What is `shared` by the processes that a launcher has started joins them, each with a GPU of its own; anything else
    is one process. ConfigError names a device that this machine lacks.
    """
    if not (shared and processes.launched()):
        require_one_process()
    elif device.startswith("cuda:"):
        raise ConfigError(f"device {device!r} is one GPU, and several processes have one each; use auto, cuda or cpu")
    chosen = available_device(device)
    if precision == "auto":
        precision = "bf16" if chosen.startswith("cuda") and _has_bf16(chosen) else "fp32"
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one process may ask for another device
    if chosen.startswith("cuda:"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    mixed = "no" if precision == "fp32" else precision
    with processes.joining():
        patience = InitProcessGroupKwargs(timeout=processes.PATIENCE)
        return Accelerator(cpu=chosen == "cpu", mixed_precision=mixed, kwargs_handlers=[patience])


@contextmanager
def arithmetic(config: RunConfig) -> Iterator[None]:
    """How torch computes in a run: with `deterministic`, by algorithms alone that repeat themselves to the bit.

    On a GPU, factors of float32 products and convolutions are rounded to TF32 (10 bits), unless the precision asked for
    is fp32. What is summed over images is in float64.
    """
    before = torch.are_deterministic_algorithms_enabled()
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)  # a module, to a type checker
    roundings = matmul.allow_tf32, cudnn.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made on a GPU
        torch.use_deterministic_algorithms(True)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = config.precision != "fp32"
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        matmul.allow_tf32, cudnn.allow_tf32 = roundings


def require_one_process() -> None:
    """ConfigError where a launcher has started several processes, or its variables are left over.

    Where they are not all there, the others would be awaited in vain; and what is no run is not shared out.
    """
    left = [name for name in SIZES if os.environ.get(name, "1") != "1"]
    if os.environ.get("LOCAL_RANK", "-1") != "-1" and os.environ.get("WORLD_SIZE") != "1":
        left.append("LOCAL_RANK")
    if left:
        raise ConfigError(
            f"{left[0]} is {os.environ[left[0]]!r} in the environment, as where several processes are launched, which "
            "`compress` takes from torchrun and accelerate alone; start this without a launcher "
            f"(`unset {' '.join(left)}`)"
        )


def available_device(device: str) -> str:
    """`cpu`, `cuda` or `cuda:N` for what was asked; ConfigError where that is not here, or does not work."""
    count = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if count and gpu_fault("cuda") is None else "cpu"
    if device.startswith("cuda"):
        if int(device.partition(":")[2] or 0) >= count:
            raise ConfigError(f"device {device!r} is not here (this machine has {count} CUDA devices); use auto or cpu")
        if fault := gpu_fault(device):
            raise ConfigError(f"device {device!r} is here but does not work ({fault}); use cpu, or mend its driver")
    return device


@cache
def gpu_fault(device: str) -> str | None:
    """What a GPU says when it is asked for one sum; None where it works."""
    try:
        return None if (torch.ones(8, device=device) + 1).sum().item() == 16 else "1 + 1 is not 2"
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        return str(error).strip().partition("\n")[0]


def _has_bf16(device: str) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones only emulate it
