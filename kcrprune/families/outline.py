"""Networks on the meta device, where they take no memory, and no time for weights that nobody reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLS: Final = {  # of torch's and timm's initialisers; without numbers they took most of the time of an outline
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.fill_),
    Tensor.zero_,
}


class _Unfilled(TorchFunctionMode):
    """Passes over what only fills a tensor."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in FILLS else func(*args, **(kwargs or {}))


@contextmanager
def outlining() -> Iterator[None]:
    """Inside, what is built lies on the meta device."""
    with torch.device("meta"), _Unfilled():
        yield
