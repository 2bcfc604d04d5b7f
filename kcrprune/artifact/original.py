"""The file that a network came from, a detector's or a segmenter's too, with its cut tensors in their places.

No layout has a way back. The elements of the file are numbered instead, the numbers are brought to timm's names as the
weights were, and the numbers that arrive say where each weight lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from kcrprune.atomic import taken, write_atomically
from kcrprune.checkpoints.dense import Opened
from kcrprune.checkpoints.hub import fetched
from kcrprune.checkpoints.loading import build_outline, fit
from kcrprune.checkpoints.locate import Located, locate
from kcrprune.containers.container import open_container
from kcrprune.containers.contents import Contents, TensorRef, digest, read_all
from kcrprune.containers.modules import is_module
from kcrprune.containers.safetensors_file import is_safetensors
from kcrprune.errors import CheckpointError, ExportError, OutputExistsError
from kcrprune.families import Group, groups_of
from kcrprune.plan import ChannelPlan
from kcrprune.printable import printable
from kcrprune.surgery.narrow import full_plan, index_map

STRANGE, KEPT, GONE = range(3)  # of an element of the file: not of the network, kept (or zero), cut away
PLAIN: Final = (str, bytes, int, float, type(None))


@dataclass(frozen=True)
class PutBack:
    """What was written, and the entries of the old file that were not: they are training's, or no plain data."""

    path: Path
    left_out: tuple[str, ...]


def put_back(opened: Opened, into: Path, path: Path | None, folder: Path, *, keep_shapes: bool) -> PutBack:
    """Writes `into` anew with the weights of a network that was made of it; everything else of its table stays.

    With `keep_shapes` there are zeros where channels were cut, so that code which does not know of the cut computes
    what the cut network does. Without, tensors are as narrow as in the cut network, except along the stream (`mlp_io`),
    which has zeros in any case. Without a `path`, a name of its own in `folder`.
    CheckpointError for another file than that; ExportError where its tensors were resized or mixed on the way to timm's
    network; OutputExistsError where the path is taken.
    """
    found = fetched(into)
    contents = open_container(found.weights if found else into)
    if digest(contents.files) != opened.record.get("dense_digest", opened.digest):
        raise CheckpointError(f"{into} is not the file that {opened.source} was made of; name that one")
    located = locate(contents)
    table = _at(contents.tree, located.trail)
    if is_module(table):
        raise ExportError(f"{into} holds a network that was pickled whole; save its state_dict, and compress that")
    safe = all(map(is_safetensors, contents.files))
    stem = found.title if found else into.name.partition(".")[0] if into.is_file() else into.name
    path = path or folder / f"{stem}-cut{'.safetensors' if safe else '.pth'}"
    if path.exists():
        raise OutputExistsError(taken(path))
    data, left_out = _around(
        contents.tree, located.trail, _tensors(opened, contents, located, table, keep_shapes=keep_shapes)
    )

    def write(temporary: Path) -> None:
        if safe:
            save_file({name: value.contiguous() for name, value in data.items()}, temporary, dict(contents.metadata))
        else:
            torch.save(data, temporary)

    write_atomically(path, write)
    return PutBack(path, tuple(left_out))


def _at(tree: Any, trail: Sequence[str]) -> Any:
    for key in trail:
        tree = tree[key]
    return tree


def _around(tree: Any, trail: Sequence[str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The table in its wrappers again with what is plain beside it, and the names of what is not."""
    lost: list[str] = []
    below: Mapping[str, Any] = tensors
    if trail:
        inner, lost = _around(tree[trail[0]], trail[1:], tensors)
        below = {trail[0]: inner}
    kept = {name: below.get(name, value) for name, value in tree.items() if name in below or _is_plain(value)}
    return kept, [*(printable(str(name)) for name in tree if name not in kept), *lost]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN)


def _tensors(
    opened: Opened, contents: Contents, located: Located, table: Mapping[str, Any], *, keep_shapes: bool
) -> dict[str, Tensor]:
    """The tensors of a table of a file under its own names, those of the network cut."""
    refs = {name: value for name, value in table.items() if isinstance(value, TensorRef)}
    old = read_all(refs, contents.nbytes, contents.path)
    names = {id(ref): name for name, ref in refs.items()}
    own = {names[id(ref)]: old[names[id(ref)]] for ref in located.refs.values()}
    numbers = _numbers(located, opened, contents.path)
    values, state = _placed(opened, numbers, sum(map(Tensor.numel, own.values())), keep_shapes=keep_shapes)
    start = 1
    for name, tensor in own.items():
        places = slice(start, start + tensor.numel())
        start += tensor.numel()
        if bool(state[places].any()):
            old[name] = _cut(tensor, values[places].view(tensor.shape), state[places].view(tensor.shape), name)
    return old


def _numbers(located: Located, opened: Opened, path: Path) -> dict[str, Tensor]:
    """The number of the file's element that each element of the dense network is, from 1; 0 where it is none.

    ExportError where it is made of several.
    """
    numbered: dict[str, Tensor] = {}
    start = 1
    for name, ref in located.refs.items():
        count = prod(ref.shape)
        numbered[name] = torch.arange(start, start + count, dtype=torch.float64).view(ref.shape)
        start += count
    outline = build_outline(opened.architecture, path)
    found = fit(located.layout.convert(numbered), outline, outline)
    for name, value in found.items():
        if bool((value != value.round()).any()) or not 0 <= float(value.min()) <= float(value.max()) < start:
            raise ExportError(
                f"{name} was resized for another image than {path} was trained on, so there is no place for it there; "
                "compress it without --img-size"
            )
    return {name: value.long() for name, value in found.items()}


def _placed(opened: Opened, numbers: Mapping[str, Tensor], count: int, *, keep_shapes: bool) -> tuple[Tensor, Tensor]:
    """New values of the file's elements by their numbers, and what becomes of each."""
    outline = build_outline(opened.architecture, opened.path)
    groups = groups_of(outline)
    plan = opened.plan or full_plan(outline, None)
    normed = [group.site for group in groups if group.norm and not _is_whole(plan, group)]
    if keep_shapes and (normed := [site for site in normed if site not in plan.gone]):
        raise ExportError(f"{normed[0]} has a norm over channels that were cut, which zeros would not leave alone")
    if not keep_shapes and plan.gone:
        raise ExportError(
            f"{min(plan.gone)} went as a whole, which no narrower tensors say; --keep-shapes puts zeros in its place"
        )
    kept = index_map(outline, groups, plan)
    narrow = {} if keep_shapes else index_map(outline, [group for group in groups if not group.wide], plan, ())
    values, state = torch.zeros(count + 1, dtype=torch.float64), torch.zeros(count + 1, dtype=torch.uint8)
    cut = opened.model.state_dict()
    for name in numbers.keys() & kept.keys() - cut.keys():  # of branches that went
        state[numbers[name]] = KEPT
    for name, value in cut.items():
        if name in numbers:
            state[numbers[name]] = GONE
            state[_part(numbers[name], narrow.get(name, {}))] = KEPT
            values[_part(numbers[name], kept.get(name, {}))] = value.to(values.dtype)
    return values, state


def _is_whole(plan: ChannelPlan, group: Group) -> bool:
    return all(kept.is_all for kept in plan.groups if kept.key == group.key)


def _part(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, torch.tensor(index, dtype=torch.long))
    return tensor


def _cut(old: Tensor, values: Tensor, state: Tensor, name: str) -> Tensor:
    """A tensor of the file with its new values, in its own type, without what is gone."""
    new = torch.where(state == STRANGE, old.to(values.dtype), values).to(old.dtype)
    if not bool(new.isfinite().all()):
        raise ExportError(f"{name} holds values that {old.dtype}, its type in the file, is too small for")
    stays = state != GONE
    for dim in range(old.ndim):
        others = [other for other in range(old.ndim) if other != dim]
        new = new.index_select(dim, _any(stays, others).nonzero().flatten())
    if new.numel() != int(stays.sum()):
        raise ExportError(f"what is left of {name} is no tensor")
    return new


def _any(mask: Tensor, dims: Sequence[int]) -> Tensor:
    return mask.amax(list(dims)) if dims else mask
