"""Parts of a network by themselves: its blocks one after the other, and what a module inside one of them sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from kcrprune.errors import UnsupportedModelError
from kcrprune.families.observed import ReachedError, reading
from kcrprune.surgery.swap import swap_

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
NO_REFIT: Final = "leave its block out with exclude, or give refit=False"


@dataclass(frozen=True)
class Step:
    """One block on the way of the stream through a network.

    `entry` are the modules between the block before and this one; where they are no modules in a row, and before the
    first block, the stream lies `apart`: it is taken from the images. `keeps` says that the block keeps the stream's
    shape. What a block is handed beside the stream (rotary positions, masks) is taken from one pass for each shape of a
    stream, since it does not depend on the images.
    """

    block: str
    entry: tuple[str, ...] = ()
    handed: Mapping[torch.Size, Arguments] = field(default_factory=dict)
    beside: int = 0  # further things that the block gives in a tuple behind the stream
    apart: bool = False
    keeps: bool = True
    alone: bool = False  # no stream leads through the block
    holds: frozenset[str] = frozenset()  # the block and others inside it

    def for_stream(self, shape: torch.Size) -> Arguments:
        """What is handed beside a stream of this shape, or of this shape for another number of images."""
        alike = (each for known, each in self.handed.items() if known[1:] == shape[1:])
        return self.handed.get(shape) or next(alike, None) or next(iter(self.handed.values()))


class Block(nn.Module):
    """A block with what it is handed beside the stream, so that a stream (B, ..., D) is all it takes."""

    def __init__(self, inside: nn.Module, step: Step) -> None:
        super().__init__()
        self.inside = inside
        self.step = step

    def forward(self, stream: Tensor) -> Tensor:
        """The stream behind the block."""
        extras, keywords = self.step.for_stream(stream.shape)
        return first_of(self.inside(stream, *extras, **keywords))


def first_of(value: Any) -> Tensor:
    """The stream of what a module takes or gives: it comes first, whatever there is beside it."""
    return value[0] if isinstance(value, tuple | list) else value


def _beside(value: Any) -> int:
    """How many things lie behind the stream."""
    return len(value) - 1 if isinstance(value, tuple | list) else 0


def _taken(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The stream of what a module is called with."""
    return inputs[0] if inputs else next(iter(keywords.values()))


@dataclass(frozen=True)
class _Call:
    """One call of a module in a pass."""

    name: str
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any

    @property
    def stream(self) -> Any:
        """What it takes in."""
        return _taken(self.inputs, self.keywords) if self.inputs or self.keywords else None

    @property
    def beside(self) -> Arguments:
        """All else that it is called with."""
        if self.inputs:
            return self.inputs[1:], self.keywords
        return (), dict(list(self.keywords.items())[1:])

    @property
    def is_stream(self) -> bool:
        """Whether a tensor goes in first and a tensor comes out first, with no other of them behind."""
        first, *behind = self.output if isinstance(self.output, tuple | list) and self.output else (self.output,)
        return isinstance(self.stream, Tensor) and isinstance(first, Tensor) and not any(map(torch.is_tensor, behind))


@torch.no_grad()
def walk(model: nn.Module, blocks: Sequence[str], batches: Sequence[Any]) -> tuple[Step, ...]:
    """How the stream passes the blocks, seen in one pass over each of `batches`.

    No stream leads through a block that is handed more of the images, or for each of them, than one tensor, or gives
    more than one. A block inside another one that a stream leads through is no step of its own.
    UnsupportedModelError where a block does not run once in a pass.
    """
    passes = [_calls(model, blocks, images) for images in batches]
    alone = {call.name for calls in passes for call in calls if call.name in blocks and not call.is_stream}
    if any(isinstance(x, Tensor) for call in passes[0] if call.name in blocks for x in _flat(call.beside)):
        others = [torch.zeros_like(images).repeat(2, 1, 1, 1) for images in batches if isinstance(images, Tensor)]
        passes += [_calls(model, blocks, images) for images in others]
    handed: dict[str, dict[torch.Size, Arguments]] = {name: {} for name in blocks}
    for call in (call for calls in passes for call in calls if call.name in blocks and call.name not in alone):
        known = handed[call.name]
        alike = [shape for shape in known if shape[1:] == call.stream.shape[1:]]
        if not all(_equal(known[shape], call.beside) for shape in alike):
            alone.add(call.name)
        known.setdefault(call.stream.shape, call.beside)
    _require_once(passes[0], blocks)
    return tuple(replace(step, handed=handed[step.block]) for step in _steps(passes[0], blocks, alone))


def _require_once(calls: Sequence[_Call], blocks: Sequence[str]) -> None:
    ran = [call.name for call in calls]
    for block in blocks:
        if (times := ran.count(block)) != 1:
            raise UnsupportedModelError(f"{block} runs {times} times in a pass, not once; {NO_REFIT}")


def _flat(value: Any) -> Iterator[Any]:
    """What lies in nested containers."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from _flat(part)


def _equal(one: Any, other: Any) -> bool:
    """Whether two calls are handed the same; what is no tensor is taken to be."""
    ours, theirs = ([part for part in _flat(value) if isinstance(part, Tensor)] for value in (one, other))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _around(blocks: Sequence[str], alone: Set[str]) -> dict[str, str]:
    """Each block with the outermost one around it that a stream leads through, or itself."""
    around = {}
    for block in blocks:
        outer = [name for name in blocks if name not in alone and block.startswith(f"{name}.")]
        around[block] = min(outer, key=len, default=block)
    return around


def _calls(model: nn.Module, blocks: Sequence[str], images: Any) -> list[_Call]:
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
            steps.append(Step(call.name, apart=True, keeps=False, alone=True, holds=holds))
            previous = None
            continue
        entry = _between(previous, call.stream, made_by) if previous is not None else None
        keeps, apart = first_of(call.output).shape == call.stream.shape, entry is None
        step = Step(call.name, entry or (), {}, _beside(call.output), apart=apart, keeps=keeps, holds=holds)
        steps.append(step)
        previous = first_of(call.output)
    return steps


def _between(before: Any, after: Any, made_by: Mapping[int, _Call]) -> tuple[str, ...] | None:
    """The modules that one tensor passes, in a row, to become the other; None where there is more to it."""
    entry: list[str] = []
    while after is not before:
        call = made_by.get(id(after))
        if call is None or any(call.beside) or len(entry) > len(made_by):
            return None
        entry.insert(0, call.name)
        after = call.stream
    return tuple(entry)


def input_of(model: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What the module `name` receives when `model` runs on the inputs; the rest of the pass is skipped."""
    return seen_in(model, *inputs, modules=(name,))[name]


@torch.no_grad()
def output_of(model: nn.Module, name: str, *inputs: Tensor) -> tuple[Tensor, int]:
    """What the module `name` gives when `model` runs on the inputs, and how many things beside it.

    The rest of the pass is skipped.
    """
    seen: list[Any] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen.append(output)
        raise ReachedError

    hook = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(*inputs)
    except ReachedError:
        pass
    finally:
        hook.remove()
    return first_of(seen[0]), _beside(seen[0])


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
        return lambda module, inputs, keywords: see(name, _taken(inputs, keywords))

    hooks = [model.get_submodule(name).register_forward_pre_hook(enter(name), with_kwargs=True) for name in modules]
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
    """In the place of a module whose outputs are known: gives `now`, whatever it is handed.

    `beside` tells how many things the module gives in a tuple behind the stream; they are None.
    """

    now: Tensor

    def __init__(self, beside: int = 0) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """That output."""
        return (self.now, *(None,) * self.beside) if self.beside else self.now


class _Passing(Replay):
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        self.now = _taken(inputs, keywords)
        return super().forward()


@contextmanager
def from_behind(model: nn.Module, steps: Sequence[Step]) -> Iterator[Replay]:
    """For the time of the block, `model` passes over its blocks: behind the last one lies what the replay gives."""
    last = Replay(steps[-1].beside)
    stand_ins = {step.block: _Passing(step.beside) for step in steps[:-1]} | {steps[-1].block: last}
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


def real_tokens(model: nn.Module, norm: str, site: str, images: Tensor) -> RealTokens:
    """Those of each of some images (B, ...), whose windows lie in adjacent rows."""
    marks = as_branch_sees(model, norm, site, images, torch.ones_like).flatten(0, -2)[:, 0]
    marks = marks[: len(marks) // len(images)]
    return RealTokens(marks.nonzero().squeeze(1), len(marks))
