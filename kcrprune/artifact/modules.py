"""Networks that were pickled whole: their weights under state-dict names, and the plain attributes of their modules."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kcrprune.artifact.clues import Clues, as_size, as_text, believed
from kcrprune.artifact.contents import TensorRef
from kcrprune.artifact.pickled_calls import Stub
from kcrprune.errors import CheckpointError

MOST_PARTS: Final = 20_000  # ours; the largest ViT of timm has 1,000 modules

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
    refs: dict[str, TensorRef] = {}
    for name, part in _parts(module):
        for key, value in _own(part):
            if isinstance(value, TensorRef):
                refs[name + key] = value
    return refs


def _own(part: Stub) -> Iterator[tuple[str, Any]]:
    """What a module holds under its own names: parameters, persistent buffers, modules."""
    held = attributes(part)
    if part.name.startswith(SCRIPTED):
        yield from _table(held).items()
        return
    transient = held.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_modules"):
        yield from _table(held.get(kind)).items()
    for key, value in _table(held.get("_buffers")).items():
        if key not in transient:
            yield key, value


def clues(module: Stub) -> Clues:
    """What the attributes of a pickled network say that its shapes do not."""
    arguments: dict[str, Any] = {}
    epsilons: list[float] = []
    heads: set[int] = set()
    for name, part in _parts(module):
        held = attributes(part)
        if "decoder" in name:  # of a self-supervised network
            continue
        heads |= {held[key] for key in ("num_heads", "num_attention_heads") if type(held.get(key)) is int}
        if part.name.endswith(".LayerNorm") and isinstance(held.get("eps"), float):
            epsilons.append(held["eps"])
        if as_text(held.get("global_pool")):
            arguments.setdefault("global_pool", held["global_pool"])
        if name.endswith(("patch_embed.", "patch_embeddings.")):
            arguments.setdefault("img_size", as_size(held.get("img_size")) or as_size(held.get("image_size")))
    if len(heads) == 1:
        arguments["num_heads"] = heads.pop()
    norm_eps = epsilons[0] if len(set(epsilons)) == 1 else None
    return Clues(source="the pickled module", arguments=believed(arguments), norm_eps=norm_eps)


def _parts(module: Stub) -> Iterator[tuple[str, Stub]]:
    """Every module with its dotted name and a dot behind it ("" for the whole)."""
    waiting: list[tuple[str, Stub]] = [("", module)]
    for _ in range(MOST_PARTS):
        if not waiting:
            return
        name, part = waiting.pop()
        yield name, part
        for key, child in _own(part):
            if is_module(child) and len(name) < 500:
                waiting.append((f"{name}{key}.", child))
    raise CheckpointError(f"the pickled module has more than {MOST_PARTS} parts, so it is not read")


def _table(value: Any) -> dict[str, Any]:
    return {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}
