"""What one forward pass shows: which weights are used where and how often, and what they read and put out.

Linears are watched where their weight is used and not where their module is called, because EVA, BEiT and Swin V2 call
`F.linear(x, self.qkv.weight, ...)`, on which a hook never fires. What a 1x1 convolution reads and gives is shown with
its channels last, as a linear's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

See = Callable[[Tensor, Tensor], None]  # what a watched linear read and put out

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Watch(TorchFunctionMode):
    """Calls `see` with input and output whenever a linear product uses one of some weights."""

    def __init__(self, watched: Mapping[Tensor, Callable[..., None]]) -> None:
        super().__init__()
        self.by_id = {id(weight): see for weight, see in watched.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call itself, seen where it is a product with a watched weight."""
        result = func(*args, **(kwargs or {}))
        see = self.watching(func, args, kwargs or {})
        if see is None:
            return result
        if func is F.linear:
            see(args[0], result)
            return result
        result = result.movedim(1, -1)  # goes on into the network, so that it has a gradient
        see(args[0].movedim(1, -1), result)
        return result.movedim(-1, 1)

    def watching(self, func: Any, args: Any, kwargs: Any) -> Callable[..., None] | None:
        """What wants to see this call."""
        if func not in (F.linear, F.conv2d):
            return None
        return self.by_id.get(id(args[1] if len(args) > 1 else kwargs["weight"]))


class ReachedError(Exception):
    """Ends a forward pass where what was wanted has been seen."""


@contextmanager
def watching(model: nn.Module, seen: Mapping[str, See]) -> Iterator[None]:
    """Watches linears of a model by name for the time of the block."""
    with Watch({model.get_submodule(name).weight: see for name, see in seen.items()}):  # type: ignore[misc]
        yield


class _Reading(Watch):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if see := self.watching(func, args, kwargs or {}):
            see(args[0] if func is F.linear else args[0].movedim(1, -1))
        return func(*args, **(kwargs or {}))


@contextmanager
def reading(model: nn.Module, seen: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Watches what linears of a model read, by name, for the time of the block; each is told before it computes."""
    with _Reading({model.get_submodule(name).weight: see for name, see in seen.items()}):  # type: ignore[misc]
        yield


class Observer(TorchFunctionMode):
    """Counts the rows that pass each weight, and the pairs of tokens of each attention, in forward passes."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names  # of the owners, by the id of their weight
        self.positions: dict[str, int] = {}  # in the order of the first call
        self.pairs: dict[str, int] = {}
        self.site: str | None = None  # the attention that is running
        self.channels = 1  # of its q, all heads together

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call itself, counted."""
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            name = self.names.get(id(args[1] if len(args) > 1 else (kwargs or {})["weight"]))
            if name is not None:
                channels = result.shape[-1 if func is F.linear else 1]
                self.positions[name] = self.positions.get(name, 0) + result.numel() // channels
        elif self.site is not None and (func is F.scaled_dot_product_attention or func in PRODUCTS):
            self._count_pairs(func, args[0], args[1])
        return result

    def _count_pairs(self, func: Any, query: Tensor, key: Tensor) -> None:
        """Rows times keys, heads apart, of the first product of an attention: (..., N, d) by (..., M, d).

        Where attention runs over channels, that is tokens times channels of a head: (..., d, N) by (..., d, N).
        """
        if self.site is None or query.ndim < 3:
            return
        keys = key.shape[-2] if func is F.scaled_dot_product_attention else key.shape[-1]
        self.pairs[self.site] = self.pairs.get(self.site, 0) + query.numel() // self.channels * keys
        self.site = None  # the second product is that of the scores with v


@torch.no_grad()
def observe(
    model: nn.Module, owners: list[str], attentions: Mapping[str, int], image: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """Rows that pass each owner of a weight, in the order of the forward pass, and pairs of each attention.

    `attentions` says how many channels the q of each has, all heads together.
    """
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in owners}
    observer = Observer({id(weight): name for name, weight in weights.items() if isinstance(weight, Tensor)})

    def enter(name: str) -> Any:
        def see(module: nn.Module, inputs: Any) -> None:
            observer.site, observer.channels = name, attentions[name]

        return see

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        observer.site = None

    hooks = [model.get_submodule(name).register_forward_pre_hook(enter(name)) for name in attentions]
    hooks += [model.get_submodule(name).register_forward_hook(leave) for name in attentions]
    try:
        with observer:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return observer.positions, observer.pairs
