"""Networks that were pickled whole: their weights under state-dict names, and the plain attributes of their modules."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kcrprune.containers.contents import TensorRef
from kcrprune.containers.pickled_calls import Stub
from kcrprune.errors import CheckpointError

MOST_PARTS: Final = 50_000  # ours; the largest ViT of timm has 5,000 modules, parameters and attributes
SCRIPTED: Final = "__torch__."  # how TorchScript calls the classes that it made


def is_module(value: Any) -> bool:
    """True for the stub of a torch module, pickled or in a TorchScript archive."""
    if not isinstance(value, Stub):
        return False
    return value.name.startswith(SCRIPTED) or {"_parameters", "_modules"} <= attributes(value).keys()


def attributes(stub: Stub) -> Mapping[str, Any]:
    """The instance attributes that a pickle restores."""
    state = stub.state
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = state[0]
    return state if isinstance(state, dict) else {}


def state_dict(module: Stub) -> dict[str, TensorRef]:
    """The tensors of a pickled module under the names of its state dict."""
    return {
        name + key: value
        for name, _, own in parts(module)
        for key, value in own.items()
        if isinstance(value, TensorRef)
    }


def parts(module: Stub) -> Iterator[tuple[str, Stub, Mapping[str, Any]]]:
    """Every module with its dotted name ("" for the whole, else with a dot behind) and what it holds itself."""
    waiting: list[tuple[str, Stub]] = [("", module)]
    seen = 0
    while waiting:
        name, part = waiting.pop()
        tables = _tables(part)
        seen += 1 + sum(map(len, tables))
        if seen > MOST_PARTS:  # before they are gone through: small files can share a large table very often
            raise CheckpointError(f"the pickled module has more than {MOST_PARTS} parts, so it is not read")
        own = {key: value for table in tables for key, value in table.items() if isinstance(key, str)}
        waiting += [(f"{name}{key}.", child) for key, child in own.items() if is_module(child) and len(name) < 500]
        yield name, part, own


def _tables(part: Stub) -> list[Mapping[Any, Any]]:
    """Where a module keeps parameters, modules and buffers; buffers that its state dict leaves out are left out."""
    held = attributes(part)
    if part.name.startswith(SCRIPTED):
        return [held]
    tables = [held.get(kind) for kind in ("_parameters", "_modules", "_buffers")]
    transient = held.get("_non_persistent_buffers_set")
    if isinstance(transient, list) and isinstance(tables[2], dict) and len(transient) <= len(tables[2]):
        names = {name for name in transient if isinstance(name, str)}
        tables[2] = {key: value for key, value in tables[2].items() if key not in names}
    return [table for table in tables if isinstance(table, dict)]
