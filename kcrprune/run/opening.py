"""The first stages of a run: the network, the images, and the refusal of whatever cannot work."""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.checkpoints.loading import build_quietly
from kcrprune.config import RunConfig
from kcrprune.errors import BudgetError, ConfigError, DataError
from kcrprune.families import Group, contract_of
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.cost import MacCost
from kcrprune.method.objective import Objective
from kcrprune.plan import ChannelPlan, Outputs, canonical_json
from kcrprune.run.context import Context
from kcrprune.run.metrics import require_board
from kcrprune.run.network import open_for_run, opened_groups
from kcrprune.run.timed import noise
from kcrprune.surgery.narrow import cut_, expand_
from kcrprune.training.images.files import is_image
from kcrprune.training.images.sets import Images, open_images
from kcrprune.training.losses import make_objective
from kcrprune.training.parts import Parts, divide, told_of_few

SIZED: Final = 4096  # files whose size is looked at, evenly spread: on a network drive each costs a round trip

Weights = dict[str, Tensor]  # a state dict


@dataclass(frozen=True)
class Network:
    """The dense network of a run, in eval mode on its device, and what is rebuilt from it."""

    dense: nn.Module  # of a network that is cut on: in dense shape again, what was cut is zero
    cost: MacCost
    name: str  # of the architecture, or the class
    outputs: Outputs
    digest: str  # of what it comes from

    @property
    def followed(self) -> nn.Module:
        """The network that the losses stay close to."""
        return self.dense

    @property
    def before(self) -> ChannelPlan | None:
        """What an earlier run has left of it; None: all."""
        return None

    @property
    def kept(self) -> float:
        """Share of the dense MACs that it has before this run."""
        return self.cost.predicted(self.before) / self.cost.dense if self.before else 1.0

    def inputs(self, batch: int) -> Any:
        """What it is timed on, so many images at once."""
        raise NotImplementedError

    def objective(self, config: RunConfig, pool: "Pool") -> Objective:
        """What search and recovery minimise."""
        return make_objective(config, self.followed, labelled=pool.labelled, outputs=self.outputs)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its groups, from the input to the head."""
        return self.cost.contract.groups

    def with_weights(self, weights: Weights | None) -> nn.Module:
        """A network of dense shape with other weights; a copy of the dense one for None."""
        model = copy.deepcopy(self.dense)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    def pruned(self, plan: ChannelPlan, weights: Weights) -> nn.Module:
        """A cut network with its weights."""
        model = cut_(copy.deepcopy(self.dense), plan)
        model.load_state_dict(weights)
        return model


@dataclass(frozen=True)
class FromFile(Network):
    """A network that was opened from a file, and the other one that its losses stay close to, if there is one."""

    opened: Opened
    teacher: Opened | None = None

    @property
    def followed(self) -> nn.Module:
        """The network that the losses stay close to."""
        return self.teacher.model if self.teacher else self.dense

    @property
    def before(self) -> ChannelPlan | None:
        """What an earlier run has left of it; None: all."""
        return self.opened.plan

    def inputs(self, batch: int) -> Tensor:
        """Noise on the network's device: (batch, C, H, W)."""
        return noise(batch, self.opened.preprocessing.input_size, next(self.dense.parameters()).device)

    def objective(self, config: RunConfig, pool: "Pool") -> Objective:
        """What search and recovery minimise."""
        return super().objective(as_used(config, self), pool)


@dataclass(frozen=True)
class Pool:
    """The images of a run, divided; `fingerprint` tells whether they are those of another day."""

    parts: Parts
    fingerprint: str
    labelled: bool  # with what the task is


@dataclass(frozen=True)
class FromFolder(Pool):
    """Images that lie in files, or are generated."""

    images: Images


def open_network(context: Context) -> FromFile:
    """The network in the checkpoint, and its teacher; one that is cut already stands in dense shape again."""
    opened = open_for_run(context.checkpoint, context.settings)
    dense = opened.model if opened.plan is None else build_quietly(opened.architecture)
    dense = dense.to(context.device).eval()
    size = opened.preprocessing.input_size
    cost = MacCost.of(dense, contract_of(dense, size), count_macs(dense, size))
    if opened.plan is not None:
        expand_(dense, opened.model.to(context.device), opened.plan)
    teacher = _teacher(context, opened)
    digest = f"{opened.digest} {teacher.digest}" if teacher else opened.digest
    return FromFile(dense, cost, opened.architecture.name, opened.outputs, digest, opened, teacher)


def _teacher(context: Context, opened: Opened) -> Opened | None:
    """The network that the losses stay close to, where it is another; ConfigError where the two cannot be compared."""
    path = context.settings.teacher
    if path is None:
        return None
    teacher = open_model(Path(path))
    own, other = (
        {
            "outputs": f"{each.class_count or each.feature_count} {each.outputs}",
            "input size": each.preprocessing.input_size,
            "mean": each.preprocessing.mean,
            "std": each.preprocessing.std,
        }
        for each in (opened, teacher)
    )
    for name, value in own.items():
        if other[name] != value:
            raise ConfigError(f"the teacher {path} has the {name} {other[name]}, and the network {value}; name another")
    teacher.model.to(context.device)
    return teacher


def allowed(context: Context, network: Network) -> Allowed[MacCost]:
    """What may be cut, and how far."""
    found = opened_groups(network.cost, context.settings)
    return replace(found, went=network.before.gone) if network.before else found


def require_target(context: Context, network: Network) -> None:
    """BudgetError for a target that the open axes cannot reach, or that is reached already."""
    target = context.settings.target_flops
    if target >= network.kept < 1:
        raise BudgetError(
            f"{context.checkpoint} keeps {network.kept:.3f} of the dense MACs already, and target {target:g} is a "
            "share of the same; give a smaller one"
        )
    require_reachable(allowed(context, network), target)


def open_pool(context: Context, network: FromFile) -> FromFolder:
    """The images, opened and divided; DataError where they do not fit."""
    settings = context.settings
    opened = network.opened
    images = open_images(settings, opened.preprocessing, opened.class_count, opened.class_names)
    return FromFolder(divide(images, settings), fingerprint(settings), images.labelled, images)


def require_task(context: Context, network: FromFile, pool: FromFolder) -> None:
    """ConfigError for a task that network and images do not allow; says what the run starts from."""
    config, opened, images = context.settings, network.opened, pool.images
    if config.tensorboard:
        require_board()
    context.say(f"{opened.architecture.name} ({opened.layout}), {network.cost.dense:,} MACs, {images.description}")
    for note in (*_told(network, config), *images.notes):
        context.say(note)
    say_without_effect(context)
    if images.generated:
        context.say("no data was given: images are generated, and the task is to agree with the dense network", True)
    if opened.new_head:
        _require_training(config, images)
    objective_of(context, network, pool)
    for sentence in told_of_few(pool.parts, config):
        context.say(sentence)
    context.say_replaced("calibration", pool.parts.replaced)


def say_without_effect(context: Context) -> None:
    """Names the settings that nothing in this run reads."""
    for name, reason in context.settings.without_effect().items():
        context.say(f"{name} = {getattr(context.settings, name)} does nothing in this run, since {reason}", True)


def _told(network: FromFile, config: RunConfig) -> Iterator[str]:
    """What a user should know of the network and its teacher, a sentence each."""
    opened, teacher = network.opened, network.teacher
    if opened.plan is not None:
        yield f"cut on from {network.kept:.3f} of the dense MACs; 'dense network' means the one before this run"
    if teacher is not None:
        yield f"the losses stay close to {teacher.architecture.name} in {teacher.source}"
    if config.dtype == "float32" and opened.file_bytes < 3 * count_parameters(opened.model):
        yield "the checkpoint stores half precision and the run float32; --dtype float16 or bfloat16 keeps its size"


def _require_training(config: RunConfig, images: Images) -> None:
    """Without a trained classifier the dense network has no answers to follow, so labels alone are the task."""
    if not images.labelled or config.task == "distill" or config.recover_steps == 0:
        raise ConfigError("the classifier is new, so it must be trained: give labelled images and recover_steps")
    if config.search_steps > 0 and config.search_weight_lr == 0:
        raise ConfigError("the classifier is new, and a search that freezes it learns nothing: give search_weight_lr")


def as_used(config: RunConfig, network: FromFile) -> RunConfig:
    """The configuration with what the network leaves no choice of."""
    return config.model_copy(update={"task": "labels"}) if network.opened.new_head else config


def objective_of(context: Context, network: Network, pool: Pool) -> Objective:
    """What search and recovery minimise."""
    return network.objective(context.settings, pool)


def fingerprint(config: RunConfig) -> str:
    """The names of all images below the data folder and the sizes of some, and the class map; the sha256 of that.

    A named dataset is taken at its word, and generated images follow from their settings.
    """
    known: list[object] = [_content(config.class_map)] if config.class_map else []
    if config.data is not None and not config.dataset:
        root = Path(config.data)
        files = sorted(_pictures(root))
        sized = files[:: 1 + len(files) // SIZED]
        known += [str(file.relative_to(root)) for file in files] + [file.stat().st_size for file in sized]
    return sha256(canonical_json(known).encode("utf-8", "surrogatepass")).hexdigest()


def _content(class_map: str) -> str:
    try:
        return sha256(Path(class_map).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        raise DataError(f"{class_map} cannot be read ({error}); name a class map that is there") from None


def _pictures(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if is_image(name))
