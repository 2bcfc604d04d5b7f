"""The stages of a run on a network in memory that are not those of one on files: opened, its batches divided, saved."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from kcrprune.artifact.artifact import content_hash
from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError, DataError, UnsupportedModelError
from kcrprune.families import BLOCKS, RULES, Feed, Given, Group, contract_of, find_groups
from kcrprune.families.contract import Rules, class_name, of_class
from kcrprune.families.given import Use, shown
from kcrprune.measure.macs import counting, require_counted
from kcrprune.method.cost import MacCost
from kcrprune.method.objective import Objective
from kcrprune.plan import canonical_json
from kcrprune.run.context import Context
from kcrprune.run.metrics import require_board
from kcrprune.run.opening import Network, Pool, say_without_effect
from kcrprune.surgery.certificate import unproven
from kcrprune.surgery.partial import walk
from kcrprune.training.evaluate import NOT_FINITE
from kcrprune.training.feeds import UsersObjective, divide_feeds, fingerprint, users_loss


@dataclass(frozen=True)
class Source:
    """A network in memory, how it is used, rules beside ours, and the batches that its loader gave."""

    model: nn.Module
    use: Use
    feeds: tuple[Feed, ...]
    rules: Rules = field(default_factory=dict)
    named: str = ""  # its functions by name, or what no other call has

    def digest(self, groups: Sequence[Group]) -> str:
        """Of weights, class, part, what may be cut and the functions' names."""
        said = [class_name(type(self.model)), self.use.part, str(groups), self.named]
        said.append(content_hash(self.model.state_dict()))
        return sha256(canonical_json(said).encode()).hexdigest()


@dataclass(frozen=True)
class InMemory(Network):
    """A network in memory: `dense` is a `Given`; costs are those of its part on the batch `feed`."""

    feed: Feed
    notes: tuple[str, ...]
    input_size: tuple[int, ...]  # of what the part is called with, for one image
    output_bytes: float  # of the outputs of an image
    loss_in_eval: bool

    @property
    def given(self) -> Given:
        """The dense network."""
        assert isinstance(self.dense, Given)
        return self.dense

    def objective(self, config: RunConfig, pool: Pool) -> Objective:
        """What search and recovery minimise: the distance to the dense outputs, and the user's loss."""
        return UsersObjective(
            dense=self.dense,
            use_labels=False,
            use_dense=True,
            kernel_weight=config.kernel_weight,
            relative=config.kernel_norm == "relative",
            outputs=self.outputs,
            in_eval=self.loss_in_eval,
        )

    def inputs(self, batch: int) -> Any:
        """ConfigError: only its loader can make a batch of so many images."""
        raise ConfigError("target_latency needs a network in a file; for one in memory give target_flops")

    def an_image(self, macs: int) -> int:
        """What a count on the batch is for one image."""
        return round(macs / len(self.feed))


def given_groups(model: nn.Module, part: str, rules: Rules) -> tuple[Group, ...]:
    """What rules find inside a part; UnsupportedModelError where that is nothing, ConfigError for a part of no name."""
    names = dict(model.named_modules())
    if part not in names:
        near = ", ".join(name for name in names if name and "." not in name)
        raise ConfigError(f"part={part!r} is no module of this {type(model).__name__}; it has {near}")
    everywhere = find_groups(model, {**RULES, **rules}, BLOCKS)
    groups = [g for g in everywhere if not part or g.site == part or g.site.startswith(f"{part}.")]
    found = {type(names[group.site]) for group in everywhere}
    for cls in rules:
        if not any(of_class({cls: True}, known) for known in found):
            name = cls if isinstance(cls, str) else class_name(cls)
            raise ConfigError(f"the rule for {name} finds nothing to cut: no such module, or none that it fits")
    if not groups:
        inside = names[part].modules()
        classes = sorted({type(module).__name__ for module in inside if type(module).__name__[0] != "_"})
        raise UnsupportedModelError(
            f"{part or type(model).__name__} has no module that kcrprune has a rule for; it is made of "
            f"{', '.join(classes)}; rules= takes one for a class of your own, and kcrprune.groups(model) lists all"
        )
    return tuple(groups)


@torch.no_grad()
def open_given(source: Source, context: Context) -> InMemory:
    """A copy of the network on the run's device, its groups proven on the first batch, its MACs counted there."""
    given = Given(_copy(source.model).to(context.device).eval(), source.use)
    feed = source.feeds[0].to(context.device)
    notes = []
    given.groups = given_groups(given.inside, source.use.part, source.rules)
    given.scales = {name: _length(value) for name, value in given.outputs(feed).items()}
    first, second = given(feed), given(feed)
    if not first.isfinite().all():
        raise DataError(NOT_FINITE)
    if not torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max())):
        raise UnsupportedModelError(
            f"this {type(source.model).__name__} answers otherwise each time it is called, in eval mode too: nothing "
            "can be compared"
        )
    contract = contract_of(given, feed)
    passed = [group for group in contract.groups if any(slot.owner in contract.positions for slot in _slots(group))]
    idle = {group.site for group in contract.groups} - {group.site for group in passed if group.axis != "heads"}
    given.groups = tuple(group for group in contract.groups if group.site not in idle)
    if idle:
        notes.append(f"left whole, since they never run or nothing that is compared follows: {', '.join(sorted(idle))}")
    for name, why in unproven(given, given.groups, feed).items():
        notes.append(f"left whole: {name}, since {why}")
        given.groups = tuple(
            group for group in given.groups if class_name(type(given.get_submodule(group.site))) != name
        )
    if not given.groups:
        raise UnsupportedModelError(f"nothing of {source.use.part or 'this network'} can be cut; {'; '.join(notes)}")
    given.tapped, sizes = _tapped(given, feed)
    cost = MacCost.of(given, contract_of(given, feed), part_macs(given, feed))
    in_eval, note = _loss_in_eval(given, feed)
    return InMemory(
        *(given, cost, class_name(type(source.model)), "features", source.digest(given.groups)),
        feed=feed,
        notes=(*notes, *note),
        input_size=sizes,
        output_bytes=4 * given(feed).numel() / len(feed),
        loss_in_eval=in_eval,
    )


def _copy(model: nn.Module) -> nn.Module:
    odd = {str(weight.dtype) for weight in model.parameters()} - {"torch.float32"}
    if odd or any(weight.is_meta for weight in model.parameters()):
        raise ConfigError(f"the network's weights are {', '.join(odd) or 'on no device'}; give it in float32")
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(f"this {type(model).__name__} cannot be copied ({error})") from error


def _slots(group: Group) -> Sequence[Any]:
    return (*group.writers, *group.readers) or group.per_head


def _length(value: Tensor) -> float:
    """The root mean square over images of an output's length; 1 for one that is zero."""
    found = float(value.float().flatten(1).square().sum(1).mean().sqrt())
    return found if found > 0 else 1.0


def _tapped(given: Given, feed: Feed) -> tuple[str, tuple[int, ...]]:
    """The linear whose inputs are the features, the last that is called as a module; and the size of an input."""
    seen: dict[str, torch.Size] = {}
    sizes: list[tuple[int, ...]] = []
    order = [slot.owner for group in reversed(given.groups) for slot in (*group.writers, *group.readers)]
    modules = [name for name in dict.fromkeys(order) if name in dict(given.named_modules())]

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            seen.setdefault(name, inputs[0].shape)

        return hook

    def size(module: nn.Module, inputs: Any, keywords: Any) -> None:
        shapes = [tuple(value.shape[1:]) for value in (*inputs, *keywords.values()) if isinstance(value, Tensor)]
        sizes.extend(shapes[:1])

    hooks: list[Any] = [given.get_submodule(name).register_forward_pre_hook(see(name)) for name in modules]
    hooks.append(given.get_submodule(given.use.part).register_forward_pre_hook(size, with_kwargs=True))
    try:
        given(feed)
    finally:
        for hook in hooks:
            hook.remove()
    strange = [name for name, shape in seen.items() if shape[0] % len(feed)]
    if strange:
        raise UnsupportedModelError(
            f"{strange[0]} takes a tensor {tuple(seen[strange[0]])}, whose first dimension is not that of the "
            f"{len(feed)} images; kcrprune cuts where images come first"
        )
    called = [name for name in modules if name in seen]
    if not called:
        raise UnsupportedModelError("no linear that may be cut is called as a module, so nothing shows its features")
    return called[0], (*sizes, ())[0]


@torch.no_grad()
def part_macs(model: Given, feed: Feed) -> int:
    """MACs of the part on a batch, in a pass of the whole network; ConfigError where it is not called."""
    with counting(model.get_submodule(model.use.part)) as counter:
        model.called(feed)
    if counter.calls == 0:
        raise ConfigError(f"the part {model.use.part!r} is never called when the network runs; name a module around it")
    return require_counted(counter)


def _loss_in_eval(given: Given, feed: Feed) -> tuple[bool, tuple[str, ...]]:
    """Whether the user's loss can be taken outside training, and a note where it cannot."""
    if given.use.loss is None:
        return True, ()
    try:
        users_loss(given.use, given.called(feed), feed.batch)
    except Exception as error:  # a detector gives boxes outside training, of which a stranger's function takes no loss
        return False, (
            f"the loss is taken in training alone, and the distance decides ({type(error).__name__}: {error})",
        )
    return True, ()


def open_feeds(source: Source, context: Context, network: InMemory) -> Pool:
    """The batches, divided; DataError where the network does not take one of their shapes."""
    for feed in shown(source.feeds):
        with torch.no_grad():
            network.given(feed.to(context.device))
    parts = divide_feeds(source.feeds, context.settings, network.output_bytes)
    return Pool(parts, fingerprint(source.feeds), labelled=False)


def require_given_task(context: Context, network: InMemory, pool: Pool) -> None:
    """ConfigError for what the network does not allow; says what the run starts from."""
    config, given, parts = context.settings, network.given, pool.parts
    if config.tensorboard:
        require_board()
    images = parts.replaced.images
    where = f"part {given.use.part!r} of {network.name}" if given.use.part else network.name
    macs = network.an_image(network.cost.dense)
    context.say(f"{where}: {macs:,} MACs an image, {images:,} images; compared: {', '.join(given.scales)}")
    for note in network.notes:
        context.say(note)
    say_without_effect(context)
    if parts.held_out[0][0] is parts.calibration[0]:  # type: ignore[index]
        context.say("one batch serves to fit on and to decide by; a loader with several divides them", True)
    if config.recover_steps > 0 and len(given.frozen) == sum(1 for _ in given.parameters()):
        raise ConfigError("every weight of the network is frozen, so nothing recovers; give recover_steps=0")
    if config.refit:
        blocks = list(dict.fromkeys(group.block for group in network.groups))
        walk(given, blocks, [feed.to(context.device) for feed in shown(parts.calibration)])
