"""MACs and parameters, as integers.

Counted operator by operator in a forward pass, as it runs; an operator that multiplies matrices and is not known is an
error, never a warning. Norms and element-wise work are not counted (as in papers' "FLOPs").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kcrprune.errors import UnsupportedModelError
from kcrprune.families import kept_widths

MATRIX_WORDS = ("mm", "mv", "matmul", "linear", "conv", "attention", "einsum", "dot", "addr", "lstm", "gru", "rnn")


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of `input_size` (channels, height, width), an exact integer.

    Makes one forward pass on the model's own device. UnsupportedModelError names an operator that multiplies
    matrices and cannot be counted.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)
    with _eval_mode(model), torch.no_grad(), counting(model) as counter:
        model(image)
    return require_counted(counter)


@contextmanager
def counting(part: nn.Module) -> Iterator["MacCounter"]:
    """Counts what `part` multiplies in passes of a network around it, whoever calls it and with what."""
    counter, fast = MacCounter(), torch.backends.mha.get_fastpath_enabled()
    before = part.register_forward_pre_hook(lambda module, inputs: counter.enter())
    behind = part.register_forward_hook(lambda module, inputs, output: counter.leave(), always_call=True)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, which tells nothing of what it multiplies
    try:
        with kept_widths(), counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        before.remove()
        behind.remove()


class MacCounter(TorchDispatchMode):
    """Multiply-accumulates of the operators that run inside one module, exact."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.calls, self.unknown = 0, 0, set[str]()
        self._inside = 0

    def enter(self) -> None:
        """The module begins."""
        self._inside += 1
        self.calls += 1

    def leave(self) -> None:
        """The module ends."""
        self._inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator itself, counted."""
        result = func(*args, **(kwargs or {}))
        if self._inside:
            name = func._overloadpacket.__name__
            if name in PRODUCTS:
                self.total += PRODUCTS[name](args, result)
            elif name.startswith("_scaled_dot_product"):
                query, key, value = args[:3]
                self.total += prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            elif _multiplies(name) and not name.startswith("upsample"):
                self.unknown.add(name)
        return result


def _convolution_macs(args: Any, result: Any) -> int:
    turned = bool(args[6]) if len(args) > 6 else False  # transposed: each input pixel writes a window
    return (args[0] if turned else result).numel() * prod(args[1].shape[1:])


def _recurrent_macs(args: Any, result: Any) -> int:
    """Of a layer or more, in one direction or two: each weight once a step of each sequence."""
    given = args[1] if isinstance(args[1], list | tuple) else args[1:3]  # cuDNN takes all of them at once
    return prod(args[0].shape[:2]) * sum(weight.numel() for weight in given if weight.ndim == 2)


PRODUCTS: Final[dict[str, Callable[[Any, Any], int]]] = {  # aten's, of (arguments, result)
    "mm": lambda args, result: result.numel() * args[0].shape[-1],
    "bmm": lambda args, result: result.numel() * args[0].shape[-1],
    "mv": lambda args, result: args[0].numel(),
    "dot": lambda args, result: args[0].numel(),
    "addmm": lambda args, result: result.numel() * args[1].shape[-1],
    "baddbmm": lambda args, result: result.numel() * args[1].shape[-1],
    "convolution": _convolution_macs,
    "_convolution": _convolution_macs,
    "mkldnn_rnn_layer": _recurrent_macs,
    "_cudnn_rnn": _recurrent_macs,
}


def require_counted(counter: MacCounter) -> int:
    """What was counted; UnsupportedModelError names an operator that multiplies matrices and cannot be counted."""
    if counter.unknown:
        unknown = ", ".join(sorted(counter.unknown))
        raise UnsupportedModelError(f"cannot count the MACs of {unknown}; no honest figure exists")
    return counter.total


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


def _multiplies(name: str) -> bool:
    return name not in {"mul", "mul_"} and any(word in name for word in MATRIX_WORDS)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
