"""Which tensors of a file are the network's: wrappers opened, the layout recognised, prefixes removed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from kcrprune.checkpoints.layouts import LAYOUTS
from kcrprune.checkpoints.layouts.base import Layout
from kcrprune.checkpoints.layouts.refused import REFUSED
from kcrprune.checkpoints.layouts.timm import REGISTERED
from kcrprune.checkpoints.leftovers import needed_beside, refuse, refuse_adapters
from kcrprune.containers.contents import Contents, TensorRef, some
from kcrprune.containers.modules import is_module, state_dict
from kcrprune.errors import CheckpointError, UnsupportedModelError

Refs = Mapping[str, TensorRef]

# what training code calls the weights, best first: averages before the last step, a teacher before its student
WRAPPERS: Final[dict[str, str]] = {
    "state_dict_ema": "moving average (EMA) of a timm training checkpoint",
    "model_ema": "moving average (EMA) of a training checkpoint",
    "ema_state_dict": "moving average (EMA) of a training checkpoint",
    "ema": "moving average (EMA) of a training checkpoint",
    "teacher": "teacher of a self-distilled network",
    "target_encoder": "target encoder of a self-supervised network",
    "state_dict": "training checkpoint",
    "model": "checkpoint with a model entry",
    "model_state_dict": "training checkpoint",
    "model_state": "training checkpoint",
    "module": "training checkpoint",
    "net": "training checkpoint",
    "network": "training checkpoint",
    "params": "training checkpoint",
    "weights": "training checkpoint",
    "encoder": "encoder of a self-supervised network",
    "student": "student of a self-distilled network",
}
PREFERRED: Final = ("teacher", "ema", "base_encoder")  # words in a prefix, where a file holds several networks
DEEPEST: Final = 4  # ours; wrappers inside wrappers, and words of a prefix
MOST_PREFIXES: Final = 16  # ours; that are tried before a table of tensors is no registered network
MOST_TABLES: Final = 8  # ours
MOST_TENSORS: Final = 20_000  # ours; the largest ViT of timm has 700
FEWEST: Final = 8  # ours; a table with fewer tensors is no network (an optimizer has many such)


@dataclass(frozen=True)
class Located:
    """The network's tensors under the names of their layout, and where they lay."""

    refs: Refs
    layout: Layout
    trail: tuple[str, ...]  # keys of the wrappers that were opened
    prefix: str
    left_out: tuple[str, ...]

    def notes(self, unplaced: tuple[str, ...]) -> tuple[str, ...]:
        """Where the weights were found, for people; `unplaced` are those that were read and not needed."""
        notes = [f"weights: {'.'.join(self.trail)}, the {WRAPPERS.get(self.trail[-1], 'entry')}"] if self.trail else []
        if self.prefix:
            notes.append(f"prefix {self.prefix!r} removed")
        if left_out := (*self.left_out, *unplaced):
            notes.append(f"{len(left_out)} tensors that are not the network's left out: {some(left_out)}")
        if self.layout.remark:
            notes.append(self.layout.remark)
        return tuple(notes)


def locate(contents: Contents) -> Located:
    """The network of a file; UnsupportedModelError for a known one that cannot be cut, else CheckpointError."""
    tables = {trail: _refs(table) for trail, table in islice(_tables(contents.tree), MOST_TABLES)}
    for trail, refs in tables.items():
        if len(refs) > MOST_TENSORS:
            raise CheckpointError(f"{contents.path} holds {len(refs)} tensors, more than any network that can be cut")
        refuse_adapters(refs, contents.path)
        found = _recognise(trail, refs)
        if found is None or found.layout is not REGISTERED:
            _refuse(contents, refs)
        if found:
            refuse(_needed(refs, found), contents.path)
            return found
    raise CheckpointError(_nothing(contents, tables))


def _needed(refs: Refs, found: Located) -> tuple[str, ...]:
    """The tensors beside the network that it may not do without."""
    preferred = any(word in found.prefix for word in PREFERRED)
    copies = [prefix for prefix in _prefixes(refs, found.layout.anchor) if prefix and preferred]
    beside = [name for name in found.left_out if not name.startswith(found.prefix)]
    return needed_beside(beside, found.prefix, copies)


def _refuse(contents: Contents, refs: Refs) -> None:
    """UnsupportedModelError for a network that is known and cannot be cut."""
    shapes = {name: ref.shape for name, ref in refs.items()}
    for refused in REFUSED:
        if refused.matches(shapes):
            raise UnsupportedModelError(f"{contents.path} holds {refused.sentence()}")


def _recognise(trail: tuple[str, ...], refs: Refs) -> Located | None:
    """The network in a table of tensors, in the first layout that matches."""
    for layout in LAYOUTS:
        for prefix in _prefixes(refs, layout.anchor):
            names = _strip(refs, prefix, layout)
            if layout.matches({name: refs[own].shape for name, own in names.items()}):
                return _located(trail, refs, names, prefix, layout)
    return None


def _tables(
    tree: Any, trail: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every table of tensors and every pickled module, best first; parts that are shared are looked at once."""
    seen = set() if seen is None else seen
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if is_module(tree) or len(_refs(tree)) >= FEWEST:
        yield trail, tree
    if isinstance(tree, Mapping) and len(trail) < DEEPEST:
        known = [key for key in WRAPPERS if key in tree]
        others = [key for key in tree if isinstance(key, str) and key not in WRAPPERS]
        for key in (*known, *others):
            yield from _tables(tree[key], (*trail, key), seen)


def _refs(table: Any) -> Refs:
    """The tensors of a module, or those that a table holds itself."""
    if is_module(table):
        return state_dict(table)
    if not isinstance(table, Mapping):
        return {}
    return {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, TensorRef)}


def _prefixes(refs: Refs, anchor: str) -> list[str]:
    """What stands before an anchor, or before many tensors, preferred ones first."""
    if anchor:
        found = [name.removesuffix(anchor) for name in refs if name == anchor or name.endswith("." + anchor)]
    else:
        parts = (name.split(".") for name in refs)
        counted = Counter("".join(f"{part}." for part in words[:depth]) for words in parts for depth in range(DEEPEST))
        found = [prefix for prefix, count in counted.most_common(MOST_PREFIXES) if count >= FEWEST]

    def rank(prefix: str) -> tuple[int, int, str]:
        word = next((index for index, word in enumerate(PREFERRED) if word in prefix), len(PREFERRED))
        return word, len(prefix), prefix

    return sorted(found, key=rank)


def _strip(refs: Refs, prefix: str, layout: Layout) -> dict[str, str]:
    """The tensors behind a prefix, and those that the layout keeps beside it: names without it to those of the file."""
    parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
    beside = {name: parent + name for name in layout.outside if parent + name in refs}
    return beside | {name.removeprefix(prefix): name for name in refs if name.startswith(prefix)}


def _located(trail: tuple[str, ...], refs: Refs, names: Mapping[str, str], prefix: str, layout: Layout) -> Located:
    kept = {name: own for name, own in names.items() if not name.startswith(layout.dropped)}
    left_out = tuple(sorted(refs.keys() - set(kept.values())))
    return Located({name: refs[own] for name, own in kept.items()}, layout, trail, prefix, left_out)


def _nothing(contents: Contents, tables: Mapping[tuple[str, ...], Refs]) -> str:
    names = [name for refs in tables.values() for name in refs]
    if not names:
        return f"{contents.path} is a {contents.container} without named weights"
    return (
        f"{contents.path} is a {contents.container} with {len(names)} tensors ({some(names)}), but no ViT or Swin "
        "that kcrprune knows"
    )
