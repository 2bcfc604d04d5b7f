"""Wall time of a network."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor


def latency_ms(call: Callable[[Tensor], object], images: Tensor, *, warmup: int = 10, runs: int = 50) -> float:
    """Median wall time of `call(images)` in milliseconds, over `runs` calls after `warmup` that are not timed.

    Work that is queued on the images' device counts: the clock stops when the device is done.
    """
    with torch.inference_mode():
        for _ in range(warmup):
            call(images)
        return median(_one_call_ms(call, images) for _ in range(runs))


def _one_call_ms(call: Callable[[Tensor], object], images: Tensor) -> float:
    _wait_for(images.device)
    start = time.perf_counter()
    call(images)
    _wait_for(images.device)
    return 1000 * (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
