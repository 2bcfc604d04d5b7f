"""The processes that share one run: which of them this is, which part is its own, what they add up and agree on.

A launcher (torchrun, accelerate, SLURM) starts them and says so in the environment; accelerate joins them to torch's
group. All collective calls of the package are made here, in the same order by all processes. Alone nothing is sent.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kcrprune.errors import LostProcessError, ran_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

TOLD: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher of torch's sets
PATIENCE: Final = timedelta(minutes=30)  # for a process that is alive and does not answer; a dead one is known at once
FAILED: Final = "kcrprune: failed"  # counts those that have failed, where all can see it

T = TypeVar("T")


@dataclass
class Sent:
    """What this process has put into collective calls: how many there were, and their bytes."""

    calls: int = 0
    bytes: int = 0


SENT: Final = Sent()


# what a launcher says


def launched() -> bool:
    """Whether the environment says, in full, that several processes are one run."""
    return all(os.environ.get(name) for name in TOLD) and os.environ["WORLD_SIZE"] != "1"


def is_silent() -> bool:
    """Whether another process prints what there is to see."""
    return launched() and os.environ["RANK"] != "0"


def may_tell_failure() -> bool:
    """Whether this process says how the run failed: the first one that asks does, since the rest follows from it.

    Before the processes know each other, one of each machine does.
    """
    if not launched():
        return True
    if count() == 1:
        return os.environ["LOCAL_RANK"] == "0"
    from torch import distributed

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return store.add(FAILED, 1) == 1
    except (RuntimeError, ValueError):  # whoever kept it is gone
        return True


@contextmanager
def joining() -> "Iterator[None]":
    """What is done inside joins the processes; LostProcessError where they do not find each other."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not launched():
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostProcessError(
            f"the {os.environ['WORLD_SIZE']} processes of WORLD_SIZE did not all meet at {where} "
            f"({str(error).splitlines()[0]}); start them with torchrun or accelerate launch"
        ) from error


# what one's own part is


def rank() -> int:
    """The number of this process, from 0."""
    distributed = _group()
    return distributed.get_rank() if distributed else 0


def count() -> int:
    """How many processes there are."""
    distributed = _group()
    return distributed.get_world_size() if distributed else 1


def own(items: T) -> T:
    """This process's part of what all of them have, a list or rows: adjacent ones, one more than others at most."""
    every: Any = items
    first, last = (ceil(len(every) * number / count()) for number in (rank(), rank() + 1))
    return every[first:last]


def places(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Of batches that this process has `sizes` images of: the place of its first image in each, and the batch's size.

    All processes have as many batches.
    """
    of_every = of_all(list(sizes))
    return [(sum(parts[: rank()]), sum(parts)) for parts in zip(*of_every, strict=True)]


# what they add up and agree on


def summed(tensor: "Tensor") -> "Tensor":
    """The sum of a tensor over all processes, the same to the bit for each."""
    distributed = _group()
    if not distributed:
        return tensor
    total = tensor.detach().to(_device(), copy=True)
    _call(total.nbytes, lambda: distributed.all_reduce(total))
    return total.to(tensor.device)


def rows_of_all(batches: "Sequence[Tensor]") -> "list[Tensor]":
    """Of rows for this process's images of each batch, those for all images of it, in order."""
    if count() == 1:
        return list(batches)
    found = []
    for rows, (first, images) in zip(batches, places([len(batch) for batch in batches]), strict=True):
        whole = rows.new_zeros(images, *rows.shape[1:])
        whole[first : first + len(rows)] = rows
        found.append(summed(whole))
    return found


def of_all(data: T) -> list[T]:
    """What each process has, plain data, in their order."""
    distributed = _group()
    if not distributed:
        return [data]
    import torch

    text = _bytes(data)
    longest = torch.tensor([len(text)], device=_device())
    _call(8, lambda: distributed.all_reduce(longest, distributed.ReduceOp.MAX))
    padded = torch.nn.functional.pad(text, (0, int(longest) - len(text)), value=ord(" "))
    found = [torch.empty_like(padded) for _ in range(count())]
    _call(padded.nbytes, lambda: distributed.all_gather(found, padded))
    return [_data(each) for each in found]


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives to the first process, plain data; the others do not call it."""
    distributed = _group()
    if not distributed:
        return make()
    import torch

    text = _bytes(make()) if rank() == 0 else torch.empty(0, dtype=torch.uint8, device=_device())
    length = torch.tensor([len(text)], device=_device())
    _call(8, lambda: distributed.broadcast(length, 0))
    sent = text if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=_device())
    _call(sent.nbytes, lambda: distributed.broadcast(sent, 0))
    return _data(sent)


def tensors_of_first(make: "Callable[[], Mapping[str, Tensor]]") -> "dict[str, Tensor]":
    """The tensors that `make` gives to the first process, on the CPU of each; the others do not call it."""
    distributed = _group()
    made = dict(make()) if rank() == 0 else {}
    if not distributed:
        return made
    import torch

    forms = of_first(lambda: [(name, str(each.dtype), list(each.shape)) for name, each in made.items()])
    for name, dtype, shape in forms:
        tensor = made.get(name, torch.empty(0)) if rank() == 0 else torch.empty(shape, dtype=_dtype(dtype))
        sent = tensor.contiguous().flatten().view(torch.uint8).to(_device())
        _call(sent.nbytes, lambda sent=sent: distributed.broadcast(sent, 0))
        made[name] = sent.cpu().view(_dtype(dtype)).view(shape)
    return made


@contextmanager
def entered_by_first(place: AbstractContextManager[Path]) -> "Iterator[Path]":
    """The first process enters `place`, which is a folder, and all are told where that is."""
    with place if rank() == 0 else nullcontext(Path()) as folder:
        yield Path(of_first(lambda: str(folder)))


def _group() -> Any:
    """The module of torch where it has joined several processes; None alone."""
    distributed: Any = sys.modules.get("torch.distributed")  # where it is not loaded yet, nobody has joined
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return distributed if joined and distributed.get_world_size() > 1 else None


def _device() -> str:
    """Where what is sent must lie: NCCL knows GPUs alone."""
    return "cuda" if _group().get_backend() == "nccl" else "cpu"


def _call(size: int, call: Callable[[], object]) -> None:
    """One collective call with `size` bytes of this process; LostProcessError where another process does not answer."""
    SENT.calls, SENT.bytes = SENT.calls + 1, SENT.bytes + size
    try:
        call()
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        raise LostProcessError(
            f"another of the {count()} processes has ended or does not answer ({str(error).splitlines()[-1]}); what is "
            "finished is kept, and the same command goes on from it, with as many processes or fewer"
        ) from error


def _bytes(data: Any) -> "Tensor":
    import torch

    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8).to(_device())


def _data(text: "Tensor") -> Any:
    return json.loads(text.cpu().numpy().tobytes())


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name.removeprefix("torch."))
