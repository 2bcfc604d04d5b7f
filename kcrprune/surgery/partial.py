"""Parts of a network by themselves: its blocks one after the other, and what a module inside one of them sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kcrprune.families.observed import ReachedError, reading
from kcrprune.surgery.swap import swap_


@dataclass(frozen=True)
class Step:
    """One block on the way of the stream through a network.

    `entry` are the modules between the block before and this one; where they are no modules in a row, and before the
    first block, the stream lies `apart`: it is taken from the images. `keeps` says that the block keeps the stream's
    shape. What a block is handed beside the stream (rotary
    positions, masks) is taken from one pass, since it does not depend on the images.
    """

    block: str
    entry: tuple[str, ...]
    extras: tuple[Any, ...]
    keywords: Mapping[str, Any]
    apart: bool = False
    keeps: bool = True
    alone: bool = False  # no stream leads through the block
    holds: frozenset[str] = frozenset()  # the block and others inside it


class Block(nn.Module):
    """A block with what it is handed beside the stream, so that a stream (B, ..., D) is all it takes."""

    def __init__(self, inside: nn.Module, step: Step) -> None:
        super().__init__()
        self.inside = inside
        self.step = step

    def forward(self, stream: Tensor) -> Tensor:
        """The stream behind the block."""
        return self.inside(stream, *self.step.extras, **self.step.keywords)


@dataclass(frozen=True)
class _Call:
    """One call of a module in a pass."""

    name: str
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any

    @property
    def is_stream(self) -> bool:
        """Whether one tensor goes in first and one comes out."""
        return isinstance(self.output, Tensor) and bool(self.inputs) and isinstance(self.inputs[0], Tensor)

    @property
    def beside(self) -> list[Tensor]:
        """The tensors that the module is handed beside the stream."""
        return [value for value in (*self.inputs[1:], *self.keywords.values()) if isinstance(value, Tensor)]


@torch.no_grad()
def walk(model: nn.Module, blocks: Sequence[str], images: Tensor) -> tuple[Step, ...]:
    """How the stream passes the blocks, seen in one pass over `images`.

    No stream leads through a block that is handed more of the images, or for each of them, than one tensor, or gives
    more than one. A block inside another one that a stream leads through is no step of its own.
    """
    calls = _calls(model, blocks, images)
    alone = {call.name for call in calls if call.name in blocks and not call.is_stream}
    if any(call.beside for call in calls if call.name in blocks):
        others = _calls(model, blocks, torch.zeros_like(images).repeat(2, 1, 1, 1))
        alone |= {
            call.name
            for call, other in zip(calls, others, strict=True)
            if call.name in blocks
            and not all(torch.equal(*pair) for pair in zip(call.beside, other.beside, strict=True))
        }
    return tuple(_steps(calls, blocks, alone))


def _around(blocks: Sequence[str], alone: Set[str]) -> dict[str, str]:
    """Each block with the outermost one around it that a stream leads through, or itself."""
    around = {}
    for block in blocks:
        outer = [name for name in blocks if name not in alone and block.startswith(f"{name}.")]
        around[block] = min(outer, key=len, default=block)
    return around


def _calls(model: nn.Module, blocks: Sequence[str], images: Tensor) -> list[_Call]:
    """The calls of blocks and of what is not inside one, in the order of their ends."""
    calls: list[_Call] = []

    def see(name: str) -> Callable[..., None]:
        return lambda module, inputs, keywords, output: calls.append(_Call(name, inputs, keywords, output))

    inside = tuple(f"{block}." for block in blocks)
    names = [name for name, _ in model.named_modules() if name in blocks or (name and not name.startswith(inside))]
    hooks = [model.get_submodule(name).register_forward_hook(see(name), with_kwargs=True) for name in names]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _steps(calls: Sequence[_Call], blocks: Sequence[str], alone: Set[str]) -> list[Step]:
    made_by = {id(call.output): call for call in calls if call.name not in blocks}
    around = _around(blocks, alone)
    steps: list[Step] = []
    previous: Any = None
    for call in calls:
        if around.get(call.name) != call.name:
            continue
        holds = frozenset(name for name in blocks if around[name] == call.name)
        if call.name in alone:
            steps.append(Step(call.name, (), (), {}, apart=True, keeps=False, alone=True, holds=holds))
            previous = None
            continue
        entry = _between(previous, call.inputs[0], made_by) if previous is not None else None
        keeps = call.output.shape == call.inputs[0].shape
        extras, apart = call.inputs[1:], entry is None
        steps.append(Step(call.name, entry or (), extras, call.keywords, apart, keeps, holds=holds))
        previous = call.output
    return steps


def _between(before: Any, after: Any, made_by: Mapping[int, _Call]) -> tuple[str, ...] | None:
    """The modules that one tensor passes, in a row, to become the other; None where there is more to it."""
    entry: list[str] = []
    while after is not before:
        call = made_by.get(id(after))
        if call is None or len(entry) > len(made_by):
            return None
        entry.insert(0, call.name)
        after = call.inputs[0] if call.inputs else None
    return tuple(entry)


def input_of(model: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What the module `name` receives when `model` runs on the inputs; the rest of the pass is skipped."""
    return seen_in(model, *inputs, modules=(name,))[name]


@torch.no_grad()
def output_of(model: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What the module `name` gives when `model` runs on the inputs; the rest of the pass is skipped."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)
        raise ReachedError

    hook = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(*inputs)
    except ReachedError:
        pass
    finally:
        hook.remove()
    return seen[0]


def read_by(model: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What the linear `name` multiplies its weight by when `model` runs; the rest of the pass is skipped."""
    return seen_in(model, *inputs, linears=(name,))[name]


@torch.no_grad()
def seen_in(
    model: nn.Module, *inputs: Tensor, linears: Sequence[str] = (), modules: Sequence[str] = (), to_end: bool = False
) -> dict[str, Tensor]:
    """What linears multiply their weights by and what modules take in, by name, when `model` runs on the inputs.

    With `to_end` the output of the model is there as well, named ""; else what is behind the last of them is skipped.
    """
    seen: dict[str, Tensor] = {}
    wanted = len({*linears, *modules})

    def see(name: str, value: Tensor) -> None:
        seen.setdefault(name, value)
        if len(seen) == wanted and not to_end:
            raise ReachedError

    def enter(name: str) -> Callable[..., None]:
        return lambda module, taken: see(name, taken[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(enter(name)) for name in modules]
    try:
        with reading(model, {name: partial(see, name) for name in linears}):
            output = model(*inputs)
            return seen | {"": output}
    except ReachedError:
        return seen
    finally:
        for hook in hooks:
            hook.remove()


class Replay(nn.Module):
    """In the place of a module whose outputs are known: gives `now`, whatever it is handed."""

    now: Tensor

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """That output."""
        return self.now


class _Passing(nn.Module):
    def forward(self, stream: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        return stream


@contextmanager
def from_behind(model: nn.Module, blocks: Sequence[str]) -> Iterator[Replay]:
    """For the time of the block, `model` passes over its blocks: behind the last one lies what the replay gives."""
    last = Replay()
    stand_ins = {name: _Passing() for name in blocks[:-1]} | {blocks[-1]: last}
    taken = {name: swap_(model, name, stand_in) for name, stand_in in stand_ins.items()}
    try:
        yield last
    finally:
        for name, block in taken.items():
            swap_(model, name, block)


def as_branch_sees(model: nn.Module, norm: str, site: str, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What a branch behind a norm sees (windowed, shifted, padded with zeros) of something in the shape of the stream.

    `of(stream)` makes it from the stream at that norm, when `model` runs on x.
    """
    hook = model.get_submodule(norm).register_forward_hook(lambda module, inputs, output: of(inputs[0]))
    try:
        return input_of(model, site, x)
    finally:
        hook.remove()


@dataclass(frozen=True)
class RealTokens:
    """Which of the tokens that a branch sees of an image, flattened over its windows, are no padding."""

    places: Tensor  # of them among all
    seen: int  # tokens of an image, padding included

    @property
    def all(self) -> bool:
        """Whether there is no padding."""
        return len(self.places) == self.seen

    def of(self, tokens: Tensor) -> Tensor:
        """Those among the tokens (images * seen, C) of some images."""
        return tokens.unflatten(0, (-1, self.seen)).index_select(1, self.places).flatten(0, 1)


def real_tokens(model: nn.Module, norm: str, site: str, image: Tensor) -> RealTokens:
    """Those of one image (1, ...)."""
    marks = as_branch_sees(model, norm, site, image, torch.ones_like).flatten(0, -2)[:, 0]
    return RealTokens(marks.nonzero().squeeze(1), len(marks))
