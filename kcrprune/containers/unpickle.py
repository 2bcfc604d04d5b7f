"""Pickles read as data: a stack machine that imports nothing and calls nothing.

A pickle is a program that names functions and calls them. Here a name stays a name, and a call is either one of the
few that build plain data (ADMITTED) or an inert Stub that remembers what would have been called.
"""

import gc
import pickletools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from kcrprune.containers.pickled_calls import ADMITTED, REBUILDERS, Buildable, Call, Name, Stub, is_harmless, pairs
from kcrprune.errors import CheckpointError

MOST_OPCODES: Final = 500_000  # ours; a training checkpoint of the largest ViT has 60,000
MOST_COPIES: Final = 4  # ours; how often admitted calls may copy what was read, beside a megabyte


@dataclass(frozen=True)
class Unpickled:
    """The data of a pickle, and the names in it that were not admitted."""

    tree: Any
    foreign_names: tuple[str, ...]


def unpickle(
    file: BinaryIO, what: str, persistent: Callable[[Any], Any] | None = None, calls: Mapping[str, Call] | None = None
) -> Unpickled:
    """The data of one pickle, read from where `file` stands up to its end marker.

    `persistent` turns persistent ids into data and `calls` are further functions that build plain data. Both see
    hostile arguments: what they raise as ValueError, TypeError or LookupError refuses the file.
    """
    machine = _Machine(persistent, {**ADMITTED, **(calls or {})})
    try:
        with _no_collection():  # of a hundred thousand nested lists it would take longer than all the rest
            for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
                if count >= MOST_OPCODES:
                    raise CheckpointError(f"{what} has more than {MOST_OPCODES} instructions, so it is not read")
                machine.position = position or 0
                OPCODES[opcode.name](machine, argument)
        tree = machine.stack[-1]
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged or no checkpoint: {str(error)[:120]}") from error
    except MemoryError as error:
        raise CheckpointError(f"{what} asks for more memory than there is") from error
    return Unpickled(tree, tuple(sorted(machine.foreign)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is looked for meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Machine:
    """Stack, marks and memo of the pickle that is being read."""

    def __init__(self, persistent: Callable[[Any], Any] | None, calls: Mapping[str, Call]) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.foreign: set[str] = set()
        self.position = 0
        self.copied = 0
        self.persistent = persistent
        self.calls = calls

    def pop_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, module: Any, qualname: Any) -> None:
        """Puts a name on the stack."""
        text = f"{module}.{qualname}"
        if not (text in self.calls or text in REBUILDERS or is_harmless(text)):
            self.foreign.add(text[:200])
        self.stack.append(Name(text))

    def call(self, function: Any, arguments: Any) -> Any:
        """The result of an admitted call; for any other, a stub of it."""
        if isinstance(function, Name) and function.text in self.calls and isinstance(arguments, tuple):
            self.charge(arguments)
            return self.calls[function.text](*arguments)
        if isinstance(function, Name) and function.text in REBUILDERS and isinstance(arguments, tuple) and arguments:
            return self.call(*REBUILDERS[function.text](*arguments))
        return Stub(function.text if isinstance(function, Name) else f"a {type(function).__name__}", arguments)

    def charge(self, arguments: tuple[Any, ...]) -> None:
        """Counts what an admitted call may copy, so that copying one thing very often ends."""
        self.copied += sum(len(part) for part in arguments if isinstance(part, str | bytes))
        self.copied += sum(8 * len(part) for part in arguments if isinstance(part, list | tuple | dict))
        if self.copied > 2**20 + MOST_COPIES * self.position:
            raise ValueError("it copies the same data over and over")

    def build(self) -> None:
        """Hands a state to the object below it."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Buildable):
            self.stack[-1] = target.built(state)
        elif isinstance(target, Stub):
            target.state = state

    def append(self, items: list[Any]) -> None:
        """Adds items to the list below them."""
        target = self.stack[-1]
        (target.items if isinstance(target, Stub) else _list(target)).extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values to the table below them."""
        target = self.stack[-1]
        table = target.entries if isinstance(target, Stub) else _dict(target)
        table.update(pairs(items))

    def stack_name(self) -> None:
        """A name from two texts on the stack."""
        qualname, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(qualname, str):
            raise TypeError("a name is not a text")
        self.name(module, qualname)

    def instantiate(self, arity: int) -> None:
        """Calls what lies below `arity` operands; keyword arguments are ignored."""
        operands = [self.stack.pop() for _ in range(arity)][::-1]
        self.stack.append(self.call(self.stack.pop(), operands[0]))

    def old_instance(self, named: str | None) -> None:
        """Protocol 0's way to make an object of the items behind the mark."""
        items = self.pop_mark()
        function = Name(named.replace(" ", ".")) if named else items.pop(0)
        if isinstance(function, Name):
            self.foreign.add(function.text[:200])
        self.stack.append(self.call(function, tuple(items)))

    def load_persistent(self, identity: Any) -> None:
        """Data that lie outside the pickle."""
        if self.persistent is None:
            raise ValueError("it refers to data outside itself")
        self.stack.append(self.persistent(identity))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("items are added to what is no list")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("keys are added to what is no table")
    return value


Operation = Callable[[_Machine, Any], Any]


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _constant(make: Callable[[], Any]) -> Operation:
    return lambda machine, _: machine.stack.append(make())


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[argument] = machine.stack[-1]


def _tuple(size: int) -> Operation:
    def operation(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < size:
            raise IndexError("the stack is empty")
        machine.stack[-size:] = [tuple(machine.stack[-size:])]

    return operation


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _collect(make: Callable[[list[Any]], Any]) -> Operation:
    def operation(machine: _Machine, _: Any) -> None:
        items = machine.pop_mark()
        machine.stack.append(make(items))

    return operation


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _nothing(machine: _Machine, _: Any) -> None:
    """An instruction about framing."""


def _refused(machine: _Machine, _: Any) -> None:
    raise ValueError("it uses an instruction that no checkpoint needs")


OPCODES: Final[dict[str, Operation]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), _nothing),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER"), _refused),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
         "BINUNICODE", "BINUNICODE8"),
        _push,
    ),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_SET": _constant(list),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": _mark,
    "TUPLE": _collect(tuple),
    "LIST": _collect(list),
    "FROZENSET": _collect(list),
    "DICT": _collect(pairs),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "GET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
    "REDUCE": lambda machine, _: machine.instantiate(1),
    "NEWOBJ": lambda machine, _: machine.instantiate(1),
    "NEWOBJ_EX": lambda machine, _: machine.instantiate(2),
    "INST": lambda machine, names: machine.old_instance(names),
    "OBJ": lambda machine, _: machine.old_instance(None),
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": lambda machine, identity: machine.load_persistent(identity),
    "BINPERSID": lambda machine, _: machine.load_persistent(machine.stack.pop()),
}  # fmt: skip
