"""Peers without gradients, written from their papers' formulas: VBP, GRAIL and CORP, as methods of peers.py.

All look at the calibration images of a run, once or twice, on the dense network. Letters: I inputs of a linear, O
outputs, S channels that stay, P those that go, d channels of a head, h heads.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

import torch
from peer_methods import Method, NotReachedError, Pruned, Task, compressed, largest_within
from torch import Tensor, nn

import kcrprune
from kcrprune.artifact.artifact import open_model
from kcrprune.families import Group, Key
from kcrprune.families.observed import watching
from kcrprune.method.allowed import Allowed, require_reachable
from kcrprune.method.budget import kept_of, solve
from kcrprune.plan import ChannelPlan, Kept
from kcrprune.run.network import opened_groups
from kcrprune.surgery.narrow import cut_, full_plan, positions
from kcrprune.surgery.swap import linear_at

RIDGE: Final = 1e-3  # share of the mean energy; GRAIL's own, and what we take for CORP


@dataclass
class Moments:
    """Sums over tokens of what a linear reads."""

    rows: int
    total: Tensor  # (I,)
    products: Tensor  # (I, I)

    @classmethod
    def empty(cls, width: int) -> "Moments":
        """Of no token."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def see(self, inputs: Tensor, _: Tensor) -> None:
        """Takes in inputs (..., I)."""
        rows = inputs.detach().flatten(0, -2).double()
        self.rows, self.total = self.rows + len(rows), self.total + rows.sum(0)
        self.products.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """(I,)."""
        return self.total / self.rows

    @property
    def energy(self) -> Tensor:
        """Second moment (I, I), not centred."""
        return self.products / self.rows

    @property
    def covariance(self) -> Tensor:
        """(I, I)."""
        return self.energy - torch.outer(self.mean, self.mean)


@torch.no_grad()
def moments_of(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Of what the linears of these names read, in one pass."""
    found = {name: Moments.empty(linear_at(model, name).weight.shape[1]) for name in names}
    with watching(model, {name: moments.see for name, moments in found.items()}):
        for images in batches:
            model(images)
    return found


def ridged(matrix: Tensor, ridge: float = RIDGE) -> Tensor:
    """A symmetric matrix with a share of its mean diagonal added to each place of it."""
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def reconstructed(weight: Tensor, energy: Tensor, stay: Sequence[int]) -> Tensor:
    """GRAIL: W (O, S) that reads x_S as W (O, I) would read the ridge estimate of all x from x_S, without a mean."""
    wide = torch.linalg.solve(ridged(energy[stay][:, stay]), energy[stay])  # (S, I)
    return weight.double() @ wide.T


def compensated(weight: Tensor, moments: Moments, stay: Sequence[int], *, linear: bool) -> tuple[Tensor, Tensor]:
    """W (O, S) and what is added to the bias (O,) for x_P ~ B x_S + c: CORP; not `linear`: B = 0, which is VBP."""
    gone = [place for place in range(weight.shape[1]) if place not in set(stay)]
    weight, covariance, mean = weight.double(), moments.covariance, moments.mean
    made = torch.zeros(len(gone), len(stay), dtype=torch.float64)
    if linear:
        made = torch.linalg.solve(ridged(covariance[stay][:, stay]), covariance[stay][:, gone]).T
    return weight[:, stay] + weight[:, gone] @ made, weight[:, gone] @ (mean[gone] - made @ mean[stay])


def logit_map(queries: Tensor, keys: Tensor, stay: Sequence[int]) -> Tensor:
    """CORP: M (S, S) for which q_S (1 + M) k_S is nearest to q k over all pairs of tokens of each image.

    `queries`, `keys`: of each image the second moments (n, d, d) of a head, summed over its tokens.
    """
    gone = [place for place in range(queries.shape[-1]) if place not in set(stay)]
    inner = [moment[:, stay][:, :, stay] for moment in (queries, keys)]
    outer = [moment[:, stay][:, :, gone] for moment in (queries, keys)]
    size = len(stay)
    normal = torch.einsum("nab,ncd->acbd", *inner).reshape(size**2, size**2)
    wanted = torch.einsum("nap,ncp->ac", *outer).reshape(-1)
    return torch.linalg.solve(ridged(normal), wanted).reshape(size, size)


def vbp(task: Task) -> Pruned:
    """Variance-based pruning (2507.12988): hidden units of the smallest variance go, their means join the bias."""
    start = perf_counter()
    dense, groups = task.run.network.dense, hidden(task)
    moments = moments_of(dense, [group.readers[0].owner for group in groups], task.run.pool.parts.calibration)
    scores = {group.key: moments[group.readers[0].owner].covariance.diagonal() for group in groups}
    allowed = only(task, groups)
    require_reachable(allowed, task.target)
    plan = solve(allowed, scores, task.target, task.run.network.name)
    model = cut_(copy.deepcopy(dense), plan)
    mend_(model, dense, groups, plan, moments, linear=False)
    return Pruned(model, perf_counter() - start)


def grail(task: Task) -> Pruned:
    """GRAIL (2602.23795) behind a choice by magnitude: what reads a cut width is refitted by ridge regression."""
    start = perf_counter()
    dense = task.run.network.dense
    with TemporaryDirectory() as folder:
        chosen = {"ranking": "magnitude", "balance": False, "refit": False, "search_steps": 0}
        result = compressed(task, Path(folder), **chosen)
        plan, model = open_model(result.folder).plan, kcrprune.load(result.folder)
    assert plan is not None, "a run's network has a plan"
    seconds = sum(stage.seconds for stage in result.comparison.stages if stage.stage == "score")
    start = perf_counter() - seconds
    cut = [group for group in task.run.network.groups if group.readers and not kept(plan, group).is_all]
    readers = {group.readers[0].owner: group for group in cut}
    moments = moments_of(dense, readers, task.run.pool.parts.calibration)
    for name, group in readers.items():
        stay = kept_places(group, plan)
        weight = reconstructed(linear_at(dense, name).weight, moments[name].energy, stay)
        linear_at(model, name).weight.data.copy_(weight)
    return Pruned(model, perf_counter() - start)


def corp(task: Task) -> Pruned:
    """CORP (2602.05243): one share of hidden units and of query channels goes, and what stays stands in for it.

    Ranked by energy: of a hidden unit its variance by the squared length of its column, of a query channel E q^2 E k^2.
    """
    start = perf_counter()
    network, batches = task.run.network, task.run.pool.parts.calibration
    dense, groups, queries = network.dense, hidden(task), [g for g in network.groups if g.axis == "attn_query"]
    moments = moments_of(dense, [group.readers[0].owner for group in groups], batches)
    found = {group.key: head_moments(dense, group, batches) for group in queries}
    scores = {
        group.key: moments[owner].covariance.diagonal() * linear_at(dense, owner).weight.double().square().sum(0)
        for group in groups
        for owner in (group.readers[0].owner,)
    }
    for key, (q, k) in found.items():
        scores[key] = (q.sum(0) * k.sum(0)).diagonal(dim1=-2, dim2=-1)  # (h, d)
    allowed = only(task, [*groups, *queries])
    plan_at = partial(uniform, allowed, scores, full_plan(dense, network.name))
    plan = largest_within(plan_at, lambda plan: allowed.cost_of(widths(plan)), task.limit)
    model = cut_(copy.deepcopy(dense), plan)
    mend_(model, dense, groups, plan, moments, linear=True)
    for group in queries:
        fold_logits_(model, group, kept(plan, group), *found[group.key])
    return Pruned(model, perf_counter() - start)


@torch.no_grad()
def head_moments(model: nn.Module, group: Group, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each image, or window, the second moments (n, h, d, d) of q and of k, summed over its tokens."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    half = len(group.writers) // 2

    def see(_: Tensor, output: Tensor) -> None:
        for slot, moments in zip((group.writers[0], group.writers[half]), found, strict=True):
            rows = output[..., slot.among(group.heads, group.width)].double()
            rows = rows.unflatten(-1, (group.heads, group.width))  # (n, N, h, d)
            moments.append(torch.einsum("nthc,nthd->nhcd", rows, rows))

    if group.writers[0].owner != group.writers[half].owner:
        raise NotReachedError("q and k come out of two linears here")
    with watching(model, {group.writers[0].owner: see}):
        for images in batches:
            model(images)
    return torch.cat(found[0]), torch.cat(found[1])


def fold_logits_(model: nn.Module, group: Group, entry: Kept, queries: Tensor, keys: Tensor) -> None:
    """Makes each head's q what stands in for the channels that went."""
    linear = linear_at(model, group.writers[0].owner)
    size = entry.kept_width
    for head, stay in enumerate(entry.channels if size < group.width else ()):
        factor = torch.eye(size, dtype=torch.float64) + logit_map(queries[:, head], keys[:, head], stay)
        rows = slice(head * size, (head + 1) * size)  # q comes first
        linear.weight.data[rows] = (factor.T @ linear.weight.data[rows].double()).float()
        if linear.bias is not None:
            linear.bias.data[rows] = (factor.T @ linear.bias.data[rows].double()).float()


def mend_(
    model: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    plan: ChannelPlan,
    moments: Mapping[str, Moments],
    *,
    linear: bool,
) -> None:
    """Makes what reads hidden units do without those that went."""
    for group in groups:
        name = group.readers[0].owner
        stay = kept_places(group, plan)
        weight, shift = compensated(linear_at(dense, name).weight, moments[name], stay, linear=linear)
        reader = linear_at(model, name)
        reader.weight.data.copy_(weight)
        assert reader.bias is not None, "what writes to the stream has a bias here"
        reader.bias.data.add_(shift)


def uniform(allowed: Allowed, scores: Mapping[Key, Tensor], whole: ChannelPlan, ratio: float) -> ChannelPlan:
    """The plan that takes one share of the open widths, rounded to the allowed ones, by the scores of each head."""
    entries = {entry.key: entry for entry in whole.groups}
    for group in allowed.opened:
        width = min(allowed.levels(group), key=lambda level: abs(level - (1 - ratio) * group.width))
        best = scores[group.key].reshape(group.heads, group.width).topk(width).indices.sort().values
        entries[group.key] = kept_of(group, range(group.heads), best.tolist())
    return whole.model_copy(update={"groups": tuple(entries.values())})


def hidden(task: Task) -> list[Group]:
    """The groups of hidden units."""
    return [group for group in task.run.network.groups if group.axis == "mlp_hidden"]


def only(task: Task, groups: Sequence[Group]) -> Allowed:
    """What may be spent where these alone are open."""
    allowed = opened_groups(task.run.network.cost, task.run.context.config)
    return replace(allowed, open=frozenset(group.key for group in groups))


def kept(plan: ChannelPlan, group: Group) -> Kept:
    """The plan's entry of a group."""
    return next(entry for entry in plan.groups if entry.key == group.key)


def kept_places(group: Group, plan: ChannelPlan) -> list[int]:
    """Which inputs of a group's reader stay."""
    return sorted(positions(group.readers[0], kept(plan, group)))


def widths(plan: ChannelPlan) -> dict[Key, int]:
    """What a plan keeps of each group: channels of a head; of heads their number."""
    found = {entry.key: entry.kept_width for entry in plan.groups}
    heads = {(entry.site, "heads"): len(entry.kept_heads) for entry in plan.groups if entry.axis == "attn_value"}
    return found | heads  # type: ignore[return-value]


METHODS: Final[dict[str, Method]] = {"vbp": vbp, "grail": grail, "corp": corp}
