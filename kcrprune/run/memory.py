"""What of the memory a run takes: where what is large is kept for a while, and how many images pass at a time."""

from collections.abc import Sequence
from typing import Any, Final

import psutil
import torch
from torch import Tensor, nn

from kcrprune.run.context import Context
from kcrprune.run.folder import STORE
from kcrprune.surgery.kept import Keep, in_files, on, pinned
from kcrprune.training.portions import Portions, kept_for_gradients

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


def backward_portions(context: Context, stage: str, model: nn.Module, batches: Sequence[Any]) -> Portions:
    """How many images pass forward and back at a time: as many as a half of the memory has room for.

    Of `max_memory`, or of the machine's as a whole, so that what else runs there changes no rounding. A GPU says itself
    when it is full.
    """
    portions = Portions(stage, context.device, context.listener)
    if context.device == CPU and isinstance(batches[0], Tensor):
        asked = context.settings.max_memory
        whole = psutil.virtual_memory().total if asked is None else asked * 2**30
        fitting = int(0.5 * whole / max(1, kept_for_gradients(model, batches[0][:1])))
        if fitting < max(map(len, batches)):
            portions.at_once = max(1, fitting)
            context.tell(f"{stage}: {portions.at_once} images pass at once, which is what half of the memory holds")
    return portions


def free_memory(device: torch.device) -> int:
    """Bytes that a device, or the machine, has free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
