"""A network in memory, and batches as a loader gives them, in the shape that the stages of a run take.

`Given` is called with a `Feed` where other networks are called with images, and answers one tensor (B, d) of all
outputs that are compared. To surgery it is the network itself: the same names of modules and tensors.

Letters: B images of a batch, k outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from kcrprune.errors import ConfigError, DataError, KcrPruneError, ran_out_of_memory
from kcrprune.families.contract import Group
from kcrprune.families.observed import ReachedError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Inputs = Callable[[Any], Any] | str | int | Sequence[str | int] | None
Named = Callable[[Any], Any] | str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Use:
    """How a network is called, and what of it is compared.

    `inputs` makes a batch the network's arguments: a function whose tuple or dict they are, or names and places in the
    batch; None: the batch itself. `outputs` are names in what the network returns or names of modules whose output is
    compared, or a function of what it returns; None: whatever the part gives.
    """

    part: str = ""
    inputs: Inputs = None
    outputs: Named = None
    loss: Callable[[Any, Any], Tensor] | None = None  # of what the network returns, and the batch

    def arguments(self, batch: Any) -> Arguments:
        """What the network is called with."""
        given = asked("inputs", self.inputs, batch) if callable(self.inputs) else batch
        if isinstance(self.inputs, str | int):
            return _picked(batch, (self.inputs,))
        if isinstance(self.inputs, Sequence):
            return _picked(batch, self.inputs)
        if isinstance(given, Mapping):
            return (), dict(given)
        return (tuple(given), {}) if isinstance(given, tuple | list) else ((given,), {})

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that are asked for by name; none where a function tells."""
        if callable(self.outputs):
            return ()
        if self.outputs is None:
            return (self.part,)
        asked = (self.outputs,) if isinstance(self.outputs, str | int) else self.outputs
        return tuple(map(str, asked))


def asked(what: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a user's function gives; ConfigError names it, and the batch or output that it fails on."""
    try:
        return function(*given)
    except Exception as error:  # whatever a stranger's code may raise
        if isinstance(error, KcrPruneError) or ran_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what} fails on {described(given[-1])} ({type(error).__name__}: {reason})") from error


def _picked(batch: Any, keys: Sequence[str | int]) -> Arguments:
    """Items of a batch: those by place in order, those by name as keywords."""
    try:
        places = tuple(batch[key] for key in keys if isinstance(key, int))
        return places, {key: batch[key] for key in keys if isinstance(key, str)}
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"inputs={keys!r} does not fit a batch, which is {described(batch)} ({type(error).__name__}: {error})"
        ) from None


class Feed:
    """A batch of B images as a loader gave it; what stages ask of a tensor of images, it answers."""

    def __init__(self, batch: Any, images: int) -> None:
        self.batch, self.images = batch, images

    @classmethod
    def of(cls, batch: Any, use: Use) -> Self:
        """A batch on the CPU, counted by its first tensor, or list of tensors, that the network is called with."""
        args, keywords = use.arguments(batch)
        for value in (*args, *keywords.values()):
            if isinstance(value, Tensor) and value.ndim:
                return cls(_moved(batch, torch.device("cpu"), non_blocking=False), len(value))
            if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
                return cls(_moved(batch, torch.device("cpu"), non_blocking=False), len(value))
        raise DataError(f"no tensor is among what the network is called with: {described((args, keywords))}")

    def __len__(self) -> int:
        return self.images

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Feed":
        """The batch with its tensors on a device."""
        return Feed(_moved(self.batch, device, non_blocking=non_blocking), self.images)

    def split(self, size: int) -> "tuple[Feed]":
        """The batch, whole; ConfigError where parts of it are wanted, which nobody but its loader can make."""
        if size < self.images:
            raise ConfigError(
                f"a batch of {self.images} images does not fit the memory; give a loader whose batches are smaller"
            )
        return (self,)

    @property
    def shapes(self) -> str:
        """What it is made of, alike for batches of like shapes."""
        return described(self.batch)


def glimpse(batch: Any) -> Any:
    """Little of a batch where little will do: its first image, or a feed as it is."""
    return batch if isinstance(batch, Feed) else batch[:1]


def shown(batches: Sequence[Any]) -> list[Any]:
    """Little of all batches: of feeds one of each kind of shapes, and one more to compare it with."""
    kinds: dict[str, list[Any]] = {}
    for batch in batches:
        kinds.setdefault(batch.shapes if isinstance(batch, Feed) else "", []).append(batch)
    feeds = [batch for alike in kinds.values() for batch in alike[:2]]
    return feeds if isinstance(batches[0], Feed) else [glimpse(batches[0])]


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with a dotted name."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in _items(value):
        yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def _moved(value: Any, device: torch.device, *, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        return {key: _moved(part, device, non_blocking=non_blocking) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_moved(part, device, non_blocking=non_blocking) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # type: ignore[call-arg]
    return value


def described(value: Any) -> str:
    """The kinds and shapes of nested containers, for people."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(described, value))})"
    return type(value).__name__


class _AllSeenError(ReachedError):
    """Everything that is compared has been seen, and the rest of the pass is of no use."""


class Given(nn.Module):
    """A network in memory, called with feeds; names of modules and tensors are the network's own.

    `groups` is what may be cut of its part; `tapped` the linear whose inputs are its features. Outputs come to one
    scale: each is divided by the length that it has in the dense network, so that the squared distance of two answers
    over the squared length is the mean of the outputs' relative squared distances.
    """

    def __init__(self, inside: nn.Module, use: Use, groups: tuple[Group, ...] = ()) -> None:
        super().__init__()
        self.inside, self.use, self.groups = inside, use, groups
        self.frozen = frozenset(name for name, weight in inside.named_parameters() if not weight.requires_grad)
        self.training = inside.training
        self.tapped = ""
        self.scales: dict[str, float] = {}
        self.images = 0  # of the last call
        self.returned: Any = None  # by the last call, where a loss is taken of it
        for weight in inside.parameters():
            weight.requires_grad_(True)  # gates want gradients through it; who trains leaves what is frozen out

    def forward(self, feed: Feed) -> Tensor:
        """(B, d): all outputs side by side."""
        found = self.outputs(feed)
        if self.scales and found.keys() != self.scales.keys():
            raise DataError(f"for {feed.shapes} the network gives {_listed(found)}, and {_listed(self.scales)} before")
        return torch.cat([value.float().flatten(1) / self.scales.get(name, 1.0) for name, value in found.items()], 1)

    def outputs(self, feed: Feed) -> dict[str, Tensor]:
        """The outputs that are compared, by name, each (B, ...)."""
        self.images, names = len(feed), self.use.names
        modules = {name for name in names if name and _has(self.inside, name)}
        seen: dict[str, Any] = {}
        returned: Any = None
        with self._watched(modules, seen, to_end=self.use.loss is not None or len(modules) < len(names) or not names):
            returned = self.called(feed)
        self.returned = returned if self.use.loss is not None else None
        if callable(self.use.outputs):
            return _whole(
                dict(tensors_in(asked("outputs", self.use.outputs, returned))), len(feed), "what outputs= gives"
            )
        found = {}
        for name in names:
            found |= _named(name, seen.get(name, returned), len(feed), whole=name in (*seen, ""))
        return found

    def called(self, feed: Feed) -> Any:
        """What the network returns; DataError, in a sentence, where it cannot be called so."""
        args, keywords = self.use.arguments(feed.batch)
        try:
            return self.inside(*args, **keywords)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            if ran_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{type(self.inside).__name__} cannot be called with {described((*args, *keywords.values()))} "
                f"({type(error).__name__}: {reason}); inputs= says how a batch becomes its arguments"
            ) from error

    @contextmanager
    def _watched(self, modules: set[str], seen: dict[str, Any], *, to_end: bool) -> Iterator[None]:
        """Takes down what modules give in a pass, which ends behind the last of them unless `to_end`."""

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                seen.setdefault(name, output)
                if len(seen) == len(modules) and not to_end:
                    raise _AllSeenError

            return hook

        hooks = [self.inside.get_submodule(name).register_forward_hook(see(name)) for name in modules]
        try:
            yield
        except _AllSeenError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if missing := modules - seen.keys():
            raise ConfigError(f"{min(missing)!r} is never called when the network runs; name a module around it")

    def get_submodule(self, target: str) -> nn.Module:
        """The network's own."""
        return self.inside.get_submodule(target)

    def named_modules(self, *args: Any, **keywords: Any) -> Any:
        """The network's own, itself first."""
        return self.inside.named_modules(*args, **keywords)

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        """The network's own."""
        return self.inside.state_dict(*args, **keywords)

    def load_state_dict(self, *args: Any, **keywords: Any) -> Any:
        """Into the network."""
        return self.inside.load_state_dict(*args, **keywords)

    def get_classifier(self) -> tuple[nn.Linear, ...]:
        """None: outputs are whatever the user compares."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "returned": None}  # a copy has no graph


def _has(model: nn.Module, name: str) -> bool:
    return any(name == own for own, _ in model.named_modules())


def _named(name: str, value: Any, images: int, *, whole: bool) -> dict[str, Tensor]:
    """The tensors of an output: `whole` of what was seen, or under its name in what the network returned."""
    if whole:
        found = dict(tensors_in(value, name))
        kept = {key: each for key, each in found.items() if each.is_floating_point() and _fits(each, images)}
        if not kept:
            raise ConfigError(
                f"{name or 'the network'} gives {described(value)}, no tensor of which has {images} images first; "
                "outputs= names what is compared"
            )
        return {key or "output": each for key, each in kept.items()}
    found = {key: each for key, each in tensors_in(value) if key == name or key.startswith(f"{name}.")}
    if not found:
        raise ConfigError(
            f"there is no output {name!r}: the network returns {described(value)}, and has no such module"
        )
    return _whole(found, images, f"output {name!r}")


def _whole(found: dict[str, Tensor], images: int, what: str) -> dict[str, Tensor]:
    if not found or not all(each.is_floating_point() and _fits(each, images) for each in found.values()):
        shapes = ", ".join(described(each) for each in found.values()) or "no tensor"
        raise ConfigError(f"{what} is {shapes}; each must be of numbers with {images} images first, as the batch is")
    return {name or "output": each for name, each in found.items()}


def _fits(value: Tensor, images: int) -> bool:
    return value.ndim > 0 and value.shape[0] == images


def _listed(names: Any) -> str:
    return ", ".join(names) or "nothing"
