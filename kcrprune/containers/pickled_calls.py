"""The few calls in a pickle that build plain data, and the stub that stands for every other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

Call = Callable[..., Any]


@dataclass(frozen=True)
class Name:
    """Something that the pickle wants imported, and that is not."""

    text: str


@dataclass(eq=False)
class Stub:
    """What a call of a foreign class or function left: its name and everything that was handed to it."""

    name: str
    arguments: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<stub of {self.name}>"


class Buildable:
    """Something that a call began and that its state completes."""

    def built(self, state: Any) -> Any:
        """The complete thing."""
        raise NotImplementedError


def pairs(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn; a key that is not plain is left out, since hashing it may take forever."""
    return {key: value for key, value in zip(items[::2], items[1::2], strict=True) if _plain_key(key)}


def _plain_key(key: Any) -> bool:
    simple = str | int | float | bytes | bool | None
    return isinstance(key, simple) or (isinstance(key, tuple) and all(isinstance(part, simple) for part in key))


def _sequence(items: Any = ()) -> list[Any] | tuple[Any, ...]:
    """A list or tuple as it is; sets are read as lists."""
    if not isinstance(items, list | tuple):
        raise TypeError("a sequence is made of what is none")
    return items


def _ordered(items: Any = ()) -> dict[Any, Any]:
    """A dict from pairs."""
    return pairs([part for pair in items for part in (pair[0], pair[1])])


def _encoded(text: str, encoding: str = "") -> bytes:
    return text.encode("latin-1") if encoding in ("latin1", "latin-1") else text.encode("utf-8")


def _bytes(data: Any = b"", *encoding: str) -> bytes:
    """Bytes or a bytearray, from a text in older pickles."""
    data = _encoded(data, *encoding) if encoding else data
    if not isinstance(data, bytes):
        raise TypeError("bytes are made of what is none")
    return data


_BUILTINS: Final[dict[str, Call]] = {
    "dict": _ordered,
    "list": _sequence,
    "set": _sequence,
    "frozenset": _sequence,
    "bytes": _bytes,
    "bytearray": _bytes,
}
# what may be called, and by what it is replaced; Python 2 had another name for builtins
ADMITTED: Final[dict[str, Call]] = {
    **{f"builtins.{name}": call for name, call in _BUILTINS.items()},
    **{f"__builtin__.{name}": call for name, call in _BUILTINS.items()},
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _encoded,
    "torch.Size": _sequence,
}
# names that are harmless and common, so that nobody is told of them
PLAIN_NAMES: Final = (
    "torch.float", "torch.int", "torch.uint", "torch.bool", "torch.bfloat16", "torch.half", "numpy.ndarray",
    "builtins.object", "builtins.complex", "__builtin__.object", "__builtin__.complex",
)  # fmt: skip

# calls that name another call: (function, arguments)
REBUILDERS: Final[dict[str, Callable[..., tuple[Any, Any]]]] = {
    "copyreg._reconstructor": lambda cls, *_: (cls, ()),
    "copy_reg._reconstructor": lambda cls, *_: (cls, ()),
    "torch._tensor._rebuild_from_type_v2": lambda function, cls, arguments, *_: (function, arguments),
}


def is_harmless(text: str) -> bool:
    """True for a name that nobody needs to be told of."""
    return text.startswith(PLAIN_NAMES) or (text.startswith("torch.") and text.endswith("Storage"))
