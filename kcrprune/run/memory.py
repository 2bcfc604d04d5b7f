"""Where a run keeps what is large for a while: on the device, in the machine's memory, or in files of its folder."""

from typing import Final

import psutil
import torch

from kcrprune.run.context import Context
from kcrprune.run.folder import STORE
from kcrprune.surgery.kept import Keep, in_files, on, pinned

CPU: Final = torch.device("cpu")
SHARE: Final = 0.75  # of what is free; the rest is for the work itself


def keep_streams(context: Context, needed: int) -> Keep:
    """The first place with room for `needed` bytes; the setting `max_memory` stands for what the machine has free."""
    if context.device != CPU and needed <= SHARE * free_memory(context.device):
        return on(context.device)
    asked = context.settings.max_memory
    if needed <= (SHARE * free_memory(CPU) if asked is None else asked * 2**30):
        return pinned if context.device.type == "cuda" else on(CPU)
    assert context.folder is not None, "a run that refits has a folder"
    context.tell(f"the streams of the refit take {needed / 2**30:.1f} GiB: they lie in files of {context.folder}")
    return in_files(context.folder / STORE)


def free_memory(device: torch.device) -> int:
    """Bytes that a device, or the machine, has free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
