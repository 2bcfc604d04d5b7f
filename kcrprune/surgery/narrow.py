"""Dense to pruned and back: matrices shrink as a plan says, by one index map over slots.

No mask remains in a pruned network. Written back into dense shape it computes the same, and can be scored again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kcrprune.errors import PlanMismatchError
from kcrprune.families import SLIM, Group, Slot, Stream, groups_of, owner_of, streams_of
from kcrprune.plan import PER_HEAD, ChannelPlan, Kept
from kcrprune.surgery.constant import leave_constant_
from kcrprune.surgery.norm import GatedNorm
from kcrprune.surgery.subsets import FirstReader, FirstWriter, GatherLinear, ScatterLinear
from kcrprune.surgery.swap import linear_at, swap_

COUNTS = ("num_heads", "num_attention_heads")  # how modules of others call the number of their heads

IndexMap = dict[str, dict[int, list[int]]]  # of each tensor that a plan cuts: what it keeps of each dimension


def full_plan(model: nn.Module, architecture: str | None) -> ChannelPlan:
    """The plan that keeps everything of a dense model."""
    groups = tuple(keep_all(group) for group in groups_of(model) if group.axis != "heads")
    return ChannelPlan(architecture=architecture, groups=groups)


def keep_all(group: Group) -> Kept:
    """The entry of a plan that leaves a group whole."""
    every = tuple(range(group.width))
    heads = tuple(range(group.heads))
    return Kept(
        site=group.site,
        axis=group.axis,
        heads=group.heads,
        width=group.width,
        kept_heads=heads,
        channels=(every,) * len(heads),
    )


def cut_(
    model: nn.Module,
    plan: ChannelPlan,
    groups: Sequence[Group] | None = None,
    streams: Sequence[Stream] | None = None,
) -> nn.Module:
    """Cuts a dense model down to a plan, in place, and returns it; `groups` and `streams` are its own where known.

    PlanMismatchError where the plan was made for other groups, widths or streams; the model is then untouched.
    """
    groups = groups_of(model) if groups is None else groups
    streams = _streams(model, groups, plan) if streams is None else streams
    _check(groups, plan)
    _check_streams(groups, streams, plan)
    entries = {kept.key: kept for kept in plan.groups}
    index = index_map(model, groups, plan, streams)
    gone = {group.site: group for group in groups if group.site in plan.gone}
    groups = [group for group in groups if group.site not in gone]
    for site in dict.fromkeys(group.site for group in groups if group.axis == "heads"):
        query, value = (entries[site, axis] for axis in PER_HEAD)
        if not (query.is_all and value.is_all):
            _narrow_attention_(model, site, query, value)
    for name, dims in index.items():
        _shrink_(model, name, dims)
    for group in groups:
        if group.told:
            setattr(model.get_submodule(group.site), group.told, entries[group.key].kept_width)
        if group.wide and not entries[group.key].is_all:
            first = any(stream.holds(group) for stream in streams)
            _index_(model, group, None if first else entries[group.key].channels[0])
    for group in gone.values():
        leave_constant_(model, group)
    return model


def _streams(model: nn.Module, groups: Sequence[Group], plan: ChannelPlan) -> tuple[Stream, ...]:
    """The streams whose order a plan sets."""
    return () if plan.stream is None else streams_of(model, groups)


def _narrow_attention_(model: nn.Module, site: str, query: Kept, value: Kept) -> None:
    """Puts a slim attention in the place of a dense one; where there is none, its own forward serves fewer heads."""
    dense = model.get_submodule(site)
    if kind := SLIM.get(type(dense)):
        slim = kind.of(dense)
        slim.narrow_(query.kept_heads, query.channels, value.kept_width)
        swap_(model, site, slim)
        return
    for name in COUNTS:
        if getattr(dense, name, None) == value.heads:
            setattr(dense, name, len(value.kept_heads))


def expand_(model: nn.Module, pruned: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Makes the dense-shaped `model` compute what `pruned` computes; both came from the same network.

    What was cut is zero there, and closed in a norm over it.
    """
    groups = groups_of(model)
    index = index_map(model, groups, plan)
    own, kept = model.state_dict(), pruned.state_dict()
    with torch.no_grad():
        for name in own.keys() & index.keys() - kept.keys():  # of branches that went
            own[name].zero_()
        for name, value in kept.items():
            if name in index:
                _scatter_(own[name], value, index[name])
            elif name in own:
                own[name].copy_(value)
    return close_norms_(model, plan)


def close_norms_(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Closes what a plan cuts in the norms over it, in a model of dense shape, where its channels are zero."""
    groups = groups_of(model)
    index = index_map(model, groups, plan)
    for group in groups:
        if group.norm and (dims := index.get(f"{group.norm}.weight")):
            norm = model.get_submodule(group.norm)
            open_ = torch.zeros_like(norm.weight)  # type: ignore[arg-type]
            open_[dims[0]] = 1
            swap_(model, group.norm, GatedNorm(norm, open=open_.detach()))
    return model


def index_map(
    model: nn.Module, groups: Sequence[Group], plan: ChannelPlan, streams: Sequence[Stream] | None = None
) -> IndexMap:
    """What a plan keeps of every tensor that it cuts, by the tensor's name in the model, and in which order.

    `streams` are those of the model whose order the plan sets, where they are known; with () all stays in order.
    """
    index = _orders(model, _streams(model, groups, plan) if streams is None else streams, plan)
    for name, dims in _lost(model, groups, plan).items():
        of_one = index.setdefault(name, {})
        for dim, lost in dims.items():
            of_one[dim] = [i for i in of_one.get(dim, range(_tensor(model, name).shape[dim])) if i not in lost]
    return index


def _lost(model: nn.Module, groups: Sequence[Group], plan: ChannelPlan) -> dict[str, dict[int, set[int]]]:
    """What a plan takes of every tensor that it cuts."""
    gone: dict[str, dict[int, set[int]]] = {}
    entries = {kept.key: kept for kept in plan.groups}

    def leave_out(slot: Slot, lost: set[int]) -> None:
        for name in _tensors(model, slot) if lost else ():
            gone.setdefault(name, {}).setdefault(slot.dim, set()).update(lost)

    for group in groups:
        if group.axis == "heads":
            heads = set(range(group.width)) - set(entries[group.site, "attn_value"].kept_heads)
            for slot in group.per_head:
                leave_out(slot, {slot.start + head for head in heads})
            continue
        kept = entries[group.key]
        for slot in (*group.writers, *group.readers):
            leave_out(slot, positions(slot, keep_all(group)) - positions(slot, kept))
    return gone


def _orders(model: nn.Module, streams: Sequence[Stream], plan: ChannelPlan) -> IndexMap:
    """In which order the channels of the streams stand in each tensor that holds them; without what stays in place."""
    found: IndexMap = {}
    for stream, order in zip(streams, plan.stream or (), strict=False):
        for slot in stream.slots if any(channel != place for place, channel in enumerate(order)) else ():
            for name in _tensors(model, slot):
                size = _tensor(model, name).shape[slot.dim]
                index = found.setdefault(name, {}).setdefault(slot.dim, list(range(size)))
                index[slot.start : slot.start + stream.width] = [slot.start + channel for channel in order]
    return found


def positions(slot: Slot, kept: Kept) -> set[int]:
    """Where the kept channels lie in a slot."""
    return {
        slot.start + head * slot.stride + channel
        for head, channels in zip(kept.kept_heads, kept.channels, strict=True)
        for channel in channels
    }


def _tensors(model: nn.Module, slot: Slot) -> list[str]:
    """The tensors of a slot's owner that have its dimension: of rows the bias too."""
    owner = owner_of(model, slot.owner)
    if isinstance(owner, Tensor):
        return [slot.owner]
    own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
    return [f"{slot.owner}.{name}" for name, tensor in own if name != "index" and tensor.ndim > slot.dim]


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)


def _check_streams(groups: Sequence[Group], streams: Sequence[Stream], plan: ChannelPlan) -> None:
    """PlanMismatchError where the orders are no network's, or a group keeps others than the first of its stream."""
    orders = plan.stream or ()
    if [stream.width for stream in streams] != [len(order) for order in orders]:
        theirs, own = ([*map(len, orders)], [stream.width for stream in streams])
        raise PlanMismatchError(f"the plan sets the order of streams of {theirs} channels; this network has {own}")
    kept = {entry.key: {channel for of_head in entry.channels for channel in of_head} for entry in plan.groups}
    for stream, order in zip(streams, orders, strict=True):
        for group in groups:
            if stream.holds(group) and kept[group.key] != set(order[: len(kept[group.key])]):
                raise PlanMismatchError(
                    f"{group.axis} of {group.site!r}: the plan keeps others than the stream's first channels"
                )


def _check(groups: Sequence[Group], plan: ChannelPlan) -> None:
    own = {group.key: (group.heads, group.width) for group in groups if group.axis != "heads"}
    planned = {kept.key: (kept.heads, kept.width) for kept in plan.groups}
    of = (
        f"the plan was made for {plan.architecture!r}" if plan.architecture else "the plan was made for another network"
    )
    if own.keys() != planned.keys():
        sites, theirs = (len({site for site, _ in keys}) for keys in (own, planned))
        raise PlanMismatchError(f"{of}, which has {theirs} parts that can be cut; this network has {sites}, or others")
    for key, sizes in own.items():
        if planned[key] != sizes:
            raise PlanMismatchError(
                f"{of}: {key[1]} of {key[0]!r} has {planned[key][0]} x {planned[key][1]} channels there, and "
                f"{sizes[0]} x {sizes[1]} here"
            )
    entire = {group.site for group in groups if group.axis == "heads" and group.whole}  # all of whose heads stay
    entries = {kept.key: kept for kept in plan.groups}
    for group in groups:
        if group.axis != "heads" and group.site in plan.gone:
            _check_gone(group, entries[group.key])
        elif group.axis != "heads":
            _check_entry(group, entries[group.key], heads_stay=group.site in entire)


def _check_gone(group: Group, kept: Kept) -> None:
    """PlanMismatchError where a branch cannot go, or would leave something behind."""
    if group.constant is None or (not kept.is_all if group.wide else kept.kept_width > 0):
        raise PlanMismatchError(f"{group.axis} of {group.site!r}: the plan leaves nothing of a branch that has to stay")


def _check_entry(group: Group, kept: Kept, *, heads_stay: bool) -> None:
    """PlanMismatchError where what must stay or go together does not."""
    whole = all(len(channels) == group.width for channels in kept.channels)
    paired = all(group.channels(_units(group, channels)) == channels for channels in kept.channels)
    lost = heads_stay and len(kept.kept_heads) < group.heads
    if (group.whole and not whole) or not paired or lost:
        raise PlanMismatchError(f"{group.axis} of {group.site!r}: the plan parts channels that cannot be parted")


def _units(group: Group, channels: Sequence[int]) -> list[int]:
    if not group.tie:
        return list(channels)
    return sorted({channel // 2 if group.tie == "neighbours" else channel % group.units for channel in channels})


def _shrink_(model: nn.Module, name: str, dims: Mapping[int, list[int]]) -> None:
    """Leaves of one tensor what is kept, and tells its module."""
    module_name, _, key = name.rpartition(".")
    module, tensor = model.get_submodule(module_name), _tensor(model, name)
    kept = tensor.detach()
    for dim, index in dims.items():
        kept = kept.index_select(dim, torch.tensor(index, dtype=torch.long, device=kept.device))
    setattr(module, key, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)
    _tell_(module)


def _tell_(module: nn.Module) -> None:
    """Brings what a module states of its sizes to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1
        module.out_channels, module.groups = len(module.weight), len(module.weight) if depthwise else 1
        module.in_channels = module.groups * module.weight.shape[1]
    elif isinstance(module, BatchNorm):
        module.num_features = len(module.weight)
    elif isinstance(getattr(module, "normalized_shape", None), tuple):
        module.normalized_shape = tuple(module.weight.shape)  # type: ignore[arg-type,union-attr]


def _index_(model: nn.Module, group: Group, kept: Sequence[int] | None) -> None:
    """Lets the readers of the stream take their channels, and the writers give theirs; None: the first ones."""
    for slot in group.readers:
        reader = linear_at(model, slot.owner)
        swap_(model, slot.owner, FirstReader(reader) if kept is None else GatherLinear(reader, kept))
    for slot in group.writers:
        writer = linear_at(model, slot.owner)
        swap_(
            model,
            slot.owner,
            FirstWriter(writer, group.width) if kept is None else ScatterLinear(writer, kept, group.width),
        )


def _scatter_(whole: Tensor, part: Tensor, dims: Mapping[int, list[int]]) -> None:
    index = [
        torch.tensor(dims.get(dim, range(size)), dtype=torch.long, device=whole.device)
        for dim, size in enumerate(whole.shape)
    ]
    whole.zero_()
    whole[torch.meshgrid(*index, indexing="ij")] = part
