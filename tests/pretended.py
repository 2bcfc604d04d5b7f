"""A device that no machine has, so that the code for a GPU is tried where there is none.

Its tensors compute on the CPU, but say that they are elsewhere, and meet no tensor of the CPU, as on a GPU: what is
made on the CPU must be moved first. In `pretending` everything is counted that takes time on a GPU alone: what makes
the host wait until the device has computed, and what goes from one to the other. The device is called `lazy`, which is
a name that torch knows and has no kernels for.

What the rules are (those of CUDA):
- a tensor without dimensions may come from the CPU, as may indices, which are then moved;
- values that are read (float, bool, tolist), sizes that follow from values (nonzero, a mask as an index), and
  factorisations that are checked make the host wait;
- so does what goes down, and what goes up unless it is moved with `non_blocking`, which nothing that goes down may be;
- a generator of the CPU draws nothing on the device.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kcrprune

DEVICE = torch.device("lazy")
PACKAGE = kcrprune.__file__.removesuffix("__init__.py")

MOVES = {"_to_copy", "copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITS = {  # what reads values, has a size that follows from them, or looks whether it went well
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd"),
}


class DeviceError(Exception):
    """What a GPU would refuse."""


@dataclass
class Counts:
    """What has cost time so far; each entry is the line of the package that it comes from."""

    waits: list[str] = field(default_factory=list)
    up: list[str] = field(default_factory=list)  # from the host to the device
    down: list[str] = field(default_factory=list)

    def taken_(self) -> Self:
        """What was counted since the last call."""
        taken = type(self)(self.waits, self.up, self.down)
        self.waits, self.up, self.down = [], [], []
        return taken


class Pretended(Tensor):
    """A tensor that claims to be on the device; `held` is what it holds, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.held})"

    def tolist(self) -> Any:
        """The values, over the CPU; torch's own refuses subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DeviceError(f"{func} runs outside of `pretending`")


class _Machine(TorchDispatchMode):
    """Runs every operator: on the device where one of its tensors is there, or its result shall be."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = list(_tensors((args, *kwargs.values())))
        here = any(isinstance(tensor, Pretended) for tensor in tensors)
        there = _is_ours(kwargs["device"]) if kwargs.get("device") else here
        if name == "copy_":
            there = isinstance(args[0], Pretended)
        if here or there:
            self._watch(name, args, kwargs, tensors, there=there)
        if kwargs.get("device") and there:
            kwargs = kwargs | {"device": torch.device("cpu")}
        result = func(*_each(args, _held), **{key: _each(value, _held) for key, value in kwargs.items()})
        if name.endswith("_"):  # in place
            return args[0]
        return _each(result, Pretended) if there else result

    def _watch(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], *, there: bool) -> None:
        """Counts an operator that the device takes part in, or refuses it."""
        strangers = [tensor for tensor in tensors if tensor.ndim > 0 and not isinstance(tensor, Pretended)]
        if name in MOVES:
            if there == bool(strangers):  # from one side to the other
                blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
                if not there and not blocking:
                    raise DeviceError(
                        f"{name} goes down and is not waited for, at {_place()}: it may be read too early"
                    )
                self._note(self.counts.up if there else self.counts.down, waits=blocking)
            return
        if strangers and not (name in INDEXED and all(tensor is not args[0] for tensor in strangers)):
            raise DeviceError(f"{name} mixes tensors of the device and of the CPU, at {_place()}")
        if kwargs.get("generator") is not None:
            raise DeviceError(f"{name} draws on the device from a generator of the CPU, at {_place()}")
        for _ in strangers:
            self._note(self.counts.up, waits=True)
        masked = name in INDEXED and any(tensor.dtype == torch.bool for tensor in args[1] if tensor is not None)
        if name in WAITS or masked:
            self._note(waits=True)

    def _note(self, *transfers: list[str], waits: bool) -> None:
        place = _place()
        for where in transfers:
            where.append(place)
        if waits:
            self.counts.waits.append(place)


@contextmanager
def pretending() -> Iterator[Counts]:
    """Inside, there is the device; what is counted there is handed out."""
    lifted, autocast = torch._C._only_lift_cpu_tensors(), torch.autocast
    torch._C._set_only_lift_cpu_tensors(True)  # what is made of numbers is made on the CPU, and its move is seen
    torch.autocast = _autocast_elsewhere(autocast)  # type: ignore[misc,assignment]
    counts = Counts()
    try:
        with _Machine(counts):
            yield counts
    finally:
        torch.autocast = autocast  # type: ignore[misc]
        torch._C._set_only_lift_cpu_tensors(lifted)


def _autocast_elsewhere(autocast: Any) -> Callable[..., AbstractContextManager]:
    """torch's, which does not know the device."""

    def choose(kind: str, *args: Any, **options: Any) -> AbstractContextManager:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *args, **options)

    return choose


def _is_ours(device: Any) -> bool:
    return torch.device(device).type == DEVICE.type


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Pretended) else tensor


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What an operator takes or returns, with its tensors changed; pytrees do the same in thrice the time."""
    if isinstance(tree, Tensor):
        return change(tree)
    return type(tree)(_each(part, change) for part in tree) if isinstance(tree, list | tuple) else tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


def _place() -> str:
    """The innermost line of the package that is running."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not file.endswith("observed.py"):  # which passes calls on
            return f"{file.removeprefix(PACKAGE)}:{line}"
    return "the test"
