"""How many images go through a network at a time: fewer, where memory runs out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kcrprune import processes
from kcrprune.errors import ConfigError, ran_out_of_memory
from kcrprune.events import Listener, Note, ignore

R = TypeVar("R")


def kept_for_gradients(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass of some images (batch, C, H, W) until its backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = dict[int, int]()  # of storages, which lie apart as long as the output is there

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images.clone())  # a view would hold the whole batch
    del output
    return sum(kept.values())


@dataclass
class Portions:
    """What a stage has learned of the memory of its device, and says when it does."""

    stage: str
    device: torch.device
    listener: Listener = ignore
    at_once: int | None = None  # images; None: all of a batch

    def of(self, images: int, act: Callable[[int], R]) -> R:
        """What `act` gives, which is told how many of so many images to take at once, and begins again with fewer.

        It does not where it has summed something with other processes, which would do so once. ConfigError where not
        one image fits.
        """
        while True:
            sent, at_once = processes.SENT.calls, min(self.at_once or images, images)
            try:
                return act(at_once)
            except (MemoryError, RuntimeError) as error:  # a CPU's has no class of its own
                if not ran_out_of_memory(error) or processes.SENT.calls > sent:
                    raise
            self._halve_(at_once)  # here the error holds no tensor any more

    def of_batches(self, batches: Sequence[Tensor], act: Callable[[list[Tensor]], R]) -> R:
        """What `act` gives for batches of images, which are divided where memory runs out; then it begins again."""

        def divided(at_once: int) -> R:
            return act([part for batch in batches for part in batch.split(at_once)])

        return self.of(max(map(len, batches)), divided)

    def _halve_(self, before: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if before == 1:
            raise ConfigError(f"{self.stage}: not one image fits the memory of {self.device}; choose another device")
        self.at_once = (before + 1) // 2
        told = f"{before} images at once do not fit the memory; batches are taken in parts of {self.at_once}"
        self.listener(Note(f"{self.stage}: {told}"))
