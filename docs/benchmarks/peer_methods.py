"""The methods that peers.py compares: each takes a dense network and a share of its MACs, and gives a smaller network.

Peers are imported where they are used, since none of them is a dependency of kcrprune.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.config import RunConfig
from kcrprune.events import ignore
from kcrprune.families import build, classifiers
from kcrprune.measure.macs import count_macs
from kcrprune.method.objective import logit_distance
from kcrprune.pipeline.compress import load
from kcrprune.run.context import Context
from kcrprune.run.opening import Network, Pool
from kcrprune.surgery.narrow import cut_

NOT_PRUNING = ("load", "measure pruned", "save")  # stages of a run whose time is not counted
GRADIENT_BATCHES = 16  # batches of training images whose gradients Taylor scores sum: as many as kcrprune scores on
PROBE_BATCHES = 4  # batches that FastNAS scores each of its hundreds of candidates on
BISECTIONS = 10  # attempts at the ratio that meets a target; the last ones differ by a thousandth
LARGEST_RATIO = 0.95


Found = TypeVar("Found")


class NotReachedError(Exception):
    """A method cannot give a network of the target's size, or its library is missing."""


@dataclass(frozen=True)
class Loaded:
    """A network and images as a run has them before its first stage."""

    context: Context
    network: Network
    pool: Pool

    @classmethod
    def of(cls, checkpoint: Path, config: RunConfig) -> "Loaded":
        """Loads both."""
        context = Context(checkpoint, config, ignore)
        given = load(context)
        return cls(context, given["open"], given["images"])


@dataclass(frozen=True)
class Task:
    """What a method gets: the loaded run with network and images, the images as a folder, and the target."""

    run: Loaded
    checkpoint: Path
    data: Path  # all training images and a few test images
    target: float

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.run.network.opened.preprocessing.input_size

    @property
    def limit(self) -> int:
        """The most MACs that a method may leave."""
        return int(self.target * self.run.network.cost.dense)

    def macs(self, model: nn.Module) -> int:
        """MACs of one image, by the one counter of all rows."""
        return count_macs(model, self.input_size)


@dataclass(frozen=True)
class Pruned:
    """A network before recovery, and the wall time that it took to get there."""

    model: nn.Module
    seconds: float


Method = Callable[[Task], Pruned]


def ours(task: Task, **settings: Any) -> Pruned:
    """What kcrprune makes with some settings, without its recovery."""
    with TemporaryDirectory() as folder:
        result = compressed(task, Path(folder), **settings)
        seconds = sum(stage.seconds for stage in result.comparison.stages if stage.stage not in NOT_PRUNING)
        return Pruned(kcrprune.load(result.folder), seconds)


def scratch(task: Task) -> Pruned:
    """The network that kcrprune plans by its Fisher scores, with fresh weights."""
    with TemporaryDirectory() as folder:
        result = compressed(task, Path(folder), search_steps=0, refit=False)
        plan = open_model(result.folder).plan
    assert plan is not None, "a run's network has a plan"
    torch.manual_seed(task.run.context.config.seed)
    return Pruned(cut_(build(task.run.network.opened.architecture), plan).eval(), 0.0)


def compressed(task: Task, folder: Path, **settings: Any) -> Any:
    """A run with some settings and no recovery, in a folder."""
    config = task.run.context.config
    return kcrprune.compress(
        task.checkpoint,
        out=folder / "run",
        target_flops=task.target,
        data=str(task.data),
        recover_steps=0,
        seed=config.seed,
        workers=config.loaders,
        device=config.device,
        batch_size=config.batch_size,
        **settings,
    )


def torch_pruning(task: Task, *, inner: bool, taylor: bool) -> Pruned:
    """Torch-Pruning at the channel ratio that just meets the target.

    `inner` leaves the residual stream its width, so that only widths inside a block shrink; without, all shrink.
    `taylor` ranks by gradients over groups of like layers (isomorphic pruning), else every layer loses the same share
    by L2 norm.
    """
    _require("torch_pruning", "torch-pruning==1.6.1")
    start = perf_counter()
    dense = _unfused(task.run.network.dense)
    gradients = _gradients(dense, task) if taylor else {}

    def cut(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient.clone()
        return _cut_by_ratio_(model, ratio, torch.zeros(1, *task.input_size), inner=inner, taylor=taylor)

    model = largest_within(cut, task.macs, task.limit)
    model.zero_grad(set_to_none=True)
    return Pruned(_attention_as_in_(model, task.run.network.dense), perf_counter() - start)


def _gradients(dense: nn.Module, task: Task) -> dict[str, Tensor]:
    """Gradients of the cross-entropy with labels, summed over batches of training images."""
    for images, labels in islice(task.run.pool.parts.training, GRADIENT_BATCHES):
        F.cross_entropy(dense(images), labels).backward()
    found = {name: weight.grad for name, weight in dense.named_parameters() if weight.grad is not None}
    dense.zero_grad(set_to_none=True)
    return found


def _cut_by_ratio_(model: nn.Module, ratio: float, image: Tensor, *, inner: bool, taylor: bool) -> nn.Module:
    import torch_pruning as tp

    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=taylor,
        isomorphic=taylor,
        ignored_layers=_left_alone(model, attentions, inner=inner),
        num_heads={module.qkv: module.num_heads for module in attentions},
        prune_head_dims=True,
        customized_pruners=_merge_rule(tp),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in attentions:  # attributes that Torch-Pruning does not know of
        width = module.qkv.out_features // 3
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim, module.attn_dim = width // module.num_heads, width
        module.scale = module.head_dim**-0.5
    return model.eval()


def _left_alone(model: Any, attentions: Sequence[Any], *, inner: bool) -> list[Any]:
    """What Torch-Pruning may not touch: classifiers, Swin's bias tables, and with `inner` what writes to the stream."""
    found = [*classifiers(model)]
    found += [module.relative_position_bias_table for module in attentions if _is_windowed(module)]
    if inner:
        writers = [module.fc2 for module in model.modules() if hasattr(module, "fc2")]
        merges = [module for module in model.modules() if hasattr(module, "reduction")]
        found += [model.patch_embed, *writers, *merges, *(module.proj for module in attentions)]
    return found


def _is_windowed(attention: nn.Module) -> bool:
    return hasattr(attention, "relative_position_bias_table")


def _merge_rule(tp: Any) -> dict[type, Any]:
    """Tells Torch-Pruning that a Swin patch merge sees each input channel four times."""
    from timm.models.swin_transformer import PatchMerging

    class Rule(tp.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            four = [index + copy * layer.dim for copy in range(4) for index in idxs]
            tp.prune_layernorm_out_channels(layer.norm, four)
            tp.prune_linear_in_channels(layer.reduction, four)
            layer.dim -= len(idxs)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.reduction.out_features

        def get_in_channels(self, layer: Any) -> int:
            return layer.dim

    return {PatchMerging: Rule()}


def largest_within(cut: Callable[[float], Found], macs: Callable[[Found], int], limit: int) -> Found:
    """The largest network, or plan of one, of at most `limit` MACs that `cut` gives for some ratio, found by bisection.

    A ratio that `cut` fails at counts as too large. Where no ratio will do, its error is raised, or NotReachedError.
    """
    best, best_macs, least, low, high = None, 0, None, 0.0, LARGEST_RATIO
    failure: Exception | None = None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        try:
            model = cut(ratio)
            found = macs(model)
        except Exception as error:  # a peer's own, of any kind
            failure, high = error, ratio
            continue
        low, high = (low, ratio) if found <= limit else (ratio, high)
        least = min(found, least or found)
        if best_macs < found <= limit:
            best, best_macs = model, found
    if best is None:
        raise failure or NotReachedError(f"it leaves {least:,} MACs at a channel ratio of {low:.3f}, above {limit:,}")
    return best


def fastnas(task: Task) -> Pruned:
    """ModelOpt's FastNAS, its candidates scored by their distance to the dense network on a few batches.

    It counts two operations a MAC, and norms as well, but the channels that it cuts save as much by both counts: its
    limit is its own count of the dense network less what has to go by ours. The step of its widths is kcrprune's.
    """
    _require("modelopt", "nvidia-modelopt==0.47.* requests")
    _require("torchprofile", "torchprofile==0.0.4")
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.utils import inference_flops

    start = perf_counter()
    dense, image = _unfused(task.run.network.dense), torch.zeros(1, *task.input_size)
    limit = inference_flops(dense, dummy_input=image, unit=1.0) - 2 * (task.run.network.cost.dense - task.limit)
    with torch.no_grad():
        probes = [(batch, dense(batch)) for batch in task.run.pool.parts.scoring[:PROBE_BATCHES]]

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        model.eval()
        return -sum(float(logit_distance(model(batch), wanted)) for batch, wanted in probes) / len(probes)

    try:
        model, _ = mtp.prune(
            copy.deepcopy(dense),
            mode=[("fastnas", _fastnas_rules(task.run.context.config.round_to))],
            constraints={"flops": limit},
            dummy_input=image,
            config={"score_func": score, "data_loader": probes, "checkpoint": None, "verbose": False},
        )
    except ValueError as error:
        if "NOT all constraints can be satisfied" not in str(error):
            raise
        raise NotReachedError(
            f"no network of its search space, which is the hidden channels of the MLPs, has {task.limit:,} MACs or less"
        ) from error
    return Pruned(_attention_as_in_(model.eval(), task.run.network.dense), perf_counter() - start)


def _fastnas_rules(step: int) -> dict[str, Any]:
    from modelopt.torch.prune.fastnas import FastNASConfig

    rules = FastNASConfig().model_dump()
    for kinds in rules.values():
        for rule in kinds.values() if isinstance(kinds, dict) else ():
            for name in ("feature_divisor", "channel_divisor"):
                if isinstance(rule, dict) and name in rule:
                    rule[name] = step
    return rules


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotReachedError(f"not installed; pip install {package}")


def _unfused(model: nn.Module) -> nn.Module:
    """A copy whose attention is written out, which peers that trace a network can follow."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def _attention_as_in_(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Gives every attention of a cut network back how the dense one computes it."""
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = dense.get_submodule(name).fused_attn
    return model


METHODS: Final[dict[str, Method]] = {
    "kcrprune-no-train": partial(ours, search_steps=0),
    "kcrprune-search": partial(ours, search_steps=60, search_weight_lr=0),
    "magnitude": partial(ours, ranking="magnitude", balance=False, refit=False, search_steps=0),
    "random": partial(ours, ranking="random", balance=False, refit=False, search_steps=0),
    "tp-uniform-l2": partial(torch_pruning, inner=False, taylor=False),
    "tp-bottleneck-l2": partial(torch_pruning, inner=True, taylor=False),
    "tp-bottleneck-taylor": partial(torch_pruning, inner=True, taylor=True),
    "tp-isomorphic-taylor": partial(torch_pruning, inner=False, taylor=True),
    "modelopt-fastnas": fastnas,
    "scratch": scratch,
}
