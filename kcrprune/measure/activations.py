"""Memory that a network's own results take while images pass it."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@torch.no_grad()  # inference mode would show operators whole and hide what they make inside
def peak_activation_bytes(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """The most bytes that are held at once while one image (zeros) passes, the image counted and the weights not.

    Counted from the results of operators while they live, on the model's own device; what a kernel takes for itself
    and gives back is not seen.
    """
    weight = next(model.parameters())
    with _Living() as living:
        model(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    return living.peak


class _Living(TorchDispatchMode):
    """The storages that operators have made, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        taken = {self._place(each) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        for result in tree_iter(made):
            if isinstance(result, Tensor) and self._place(result) not in taken:
                self._hold(result.untyped_storage())
        return made

    def _place(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return

        def forget(_: object) -> None:
            del self._known[place]
            self.now -= size

        self._known[place] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
