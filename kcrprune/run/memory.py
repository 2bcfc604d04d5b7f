"""What of the memory a run takes: where what is large is kept for a while, and how many images pass at a time."""

from collections.abc import Sequence
from typing import Any, Final

import psutil
import torch
from torch import Tensor, nn

from kcrprune.run.context import Context
from kcrprune.run.folder import STORE
from kcrprune.surgery.kept import Keep, in_files, on, pinned
from kcrprune.training.portions import kept_for_gradients

CPU: Final = torch.device("cpu")
SHARE: Final = 0.75  # of what is free; the rest is for the work itself


def keep_streams(context: Context, needed: int) -> Keep:
    """The first place with room for `needed` bytes; the setting `max_memory` stands for what the machine has free."""
    if context.device != CPU and needed <= room(context, context.device):
        return on(context.device)
    if needed <= room(context, CPU):
        return pinned if context.device.type == "cuda" else on(CPU)
    assert context.folder is not None, "a run that refits has a folder"
    context.tell(f"the streams of the refit take {needed / 2**30:.1f} GiB: they lie in files of {context.folder}")
    return in_files(context.folder / STORE)


def room(context: Context, device: torch.device) -> float:
    """Bytes that may be taken of a device's or the machine's memory; of the latter, what is left of `max_memory`."""
    asked, taken = context.settings.max_memory, psutil.Process().memory_info().rss
    if device != CPU or asked is None:
        return SHARE * free_memory(device)
    return max(0.0, asked * 2**30 - taken)


def back_at_once(context: Context, what: str, model: nn.Module, batches: Sequence[Any]) -> int | None:
    """How many images may pass forward and back at a time in `what`, as half of the memory holds; None: any batch.

    Of `max_memory`, or of the machine's as a whole, so that what else runs there changes no rounding. A GPU says itself
    when it is full.
    """
    if context.device != CPU or not isinstance(batches[0], Tensor):
        return None
    asked, two = context.settings.max_memory, batches[0][:2]
    half = 0.5 * (psutil.virtual_memory().total if asked is None else asked * 2**30)
    first, second = (kept_for_gradients(model, two[:count]) for count in (1, len(two)))
    of_each = max(1, second - first if len(two) > 1 else first)
    fitting = max(1, int(1 + (half - first) / of_each))
    if fitting >= max(map(len, batches)):
        return None
    context.tell(f"{what}: {fitting} images pass forward and back at once, which half of the memory holds")
    return fitting


def free_memory(device: torch.device) -> int:
    """Bytes that a device, or the machine, has free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
