"""The code for a GPU, tried without one: every stage runs on a device of its own, and it is known what waits for it.

A search or a recovery waits at no step but those that read figures, renew the kernel's basis or look at held-out
images; what else runs over batches moves each of them once, and waits for none, or for labels that are drawn. What
happens once (a cut, a certificate) is bounded by the number of the tensors that it touches. See `pretended` for what
counts.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kcrprune import pipeline
from kcrprune.config import RunConfig
from kcrprune.events import ignore
from kcrprune.families import Contract, contract_of
from kcrprune.families.slim import kernel_widths
from kcrprune.measure.macs import count_macs
from kcrprune.method import innovations as innovations_module
from kcrprune.method.cost import MacCost
from kcrprune.plan import ChannelPlan
from kcrprune.run import context, opening, saving
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.branches import branches_of
from kcrprune.surgery.certificate import require_certificate
from kcrprune.surgery.gated import add_gates_, harden_
from kcrprune.surgery.kept import on
from kcrprune.surgery.narrow import cut_, expand_, index_map
from kcrprune.surgery.refit import refit_
from kcrprune.training import recover
from kcrprune.training.evaluate import Remembered, evaluate
from kcrprune.training.features import feature_covariance
from kcrprune.training.innovations import innovations_of
from kcrprune.training.losses import make_objective
from kcrprune.training.pace import Pace
from kcrprune.training.reconstruct import Reconstruction
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores
from kcrprune.training.search import search_
from kcrprune.training.step import READ_EVERY
from tests.pipeline.test_compress import SHORT, save
from tests.pretended import DEVICE, Counts, DeviceError, pretending
from tests.tiny import TINY, Tiny, dense_macs, open_groups, random_plan, relative_error

STEPS, READS, RENEWS = 6, 3, 2  # of a training; figures are read every 3 steps, the basis is renewed every 2
CONFIG = RunConfig(target_flops=0.8, axes=("mlp_hidden", "attn_value"), device="cpu", kernel_every=RENEWS)
ON_DEVICE = cast(Accelerator, SimpleNamespace(device=DEVICE, autocast=nullcontext))
NETWORKS = [tiny for tiny in TINY if tiny.label in ("vit", "swin", "eva02_scaled")]
OF_RENEWAL = 3  # waits: whether all is finite, two decompositions, the spectrum's way down


@dataclass
class Bench:
    """A dense network on the device, and what has been counted there."""

    tiny: Tiny
    counts: Counts
    dense: nn.Module = field(init=False)
    contract: Contract = field(init=False)
    result: Any = None  # of the last call that was counted

    def __post_init__(self) -> None:
        self.dense = self.tiny.model().to(DEVICE)
        self.contract = contract_of(self.dense, self.tiny.input_size)

    @property
    def cost(self) -> MacCost:
        return MacCost.of(self.dense, self.contract, dense_macs(self.tiny.label))

    @property
    def plan(self) -> ChannelPlan:
        return random_plan(self.dense, "tiny", seed=1)

    def batches(self, count: int) -> list[Tensor]:
        return [self.tiny.images(4, seed) for seed in range(count)]

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.tiny.images(8), torch.arange(8) % 5), 4)

    def counted(self, act: Callable[..., Any], *args: Any, **options: Any) -> tuple[int, int, int]:
        """Waits and transfers up and down of a call; what it returns is `result`."""
        self.counts.taken_()
        self.result = act(*args, **options)
        taken = self.counts.taken_()
        return len(taken.waits), len(taken.up), len(taken.down)

    def by_step(self) -> tuple[Callable[[int], Iterator[tuple[Tensor, Tensor]]], list[Counts]]:
        """Endless batches, and what was counted between each of them and the next."""
        steps: list[Counts] = []

        def told(step: int) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in cycle(self.loader()):
                steps.append(self.counts.taken_())
                yield batch

        return told, steps


@pytest.fixture(params=NETWORKS, ids=lambda tiny: tiny.label)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setitem(READ_EVERY, DEVICE.type, READS)
    monkeypatch.setattr(innovations_module, "ROUNDS", 8)
    monkeypatch.setattr(recover, "CHECKS", STEPS // READS)  # held-out images are looked at where figures are read
    dense_macs(request.param.label)  # traced on the CPU
    with pretending() as counts:
        yield Bench(request.param, counts)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# the device itself


def test_the_device_refuses_what_a_gpu_refuses():
    with pretending():
        here, there = torch.ones(2), torch.ones(2, device=DEVICE)
        assert there.device.type == DEVICE.type
        for refused in (
            lambda: here + there,
            lambda: nn.Linear(2, 2)(there),
            lambda: torch.rand(2, device=DEVICE, generator=draw()),
            lambda: there.to("cpu", non_blocking=True),
        ):
            with pytest.raises(DeviceError):
                refused()
        assert (there * torch.tensor(2.0)).tolist() == [2, 2]
    with pytest.raises(DeviceError):
        _ = there + there


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda x: (x @ x).softmax(0).sum().sqrt(), (0, 0, 0)),
        (lambda x: float(x[0, 0]), (1, 0, 0)),
        (lambda x: bool(x.any()), (1, 0, 0)),
        (lambda x: x.tolist(), (1, 0, 1)),
        (lambda x: x.cpu(), (1, 0, 1)),
        (lambda x: x[x > 0], (1, 0, 0)),
        (lambda x: torch.equal(x, x), (1, 0, 0)),
        (lambda x: torch.linalg.cholesky(x), (1, 0, 0)),
        (lambda x: torch.linalg.cholesky_ex(x), (0, 0, 0)),
        (lambda x: x[[0, 1]], (1, 1, 0)),
        (lambda x: x[torch.tensor([0, 1])], (1, 1, 0)),
        (lambda x: torch.tensor([0.0], device=DEVICE), (1, 1, 0)),
        (lambda x: torch.ones(2).to(x), (1, 1, 0)),
        (lambda x: torch.ones(2).to(x, non_blocking=True), (0, 1, 0)),
        (lambda x: x[0].copy_(torch.ones(3)), (1, 1, 0)),
        (lambda x: torch.zeros_like(x), (0, 0, 0)),
    ],
)
def test_the_device_counts_what_is_waited_for_and_moved(act: Callable[[Tensor], Any], expected: tuple[int, int, int]):
    with pretending() as counts:
        act(torch.eye(3, device=DEVICE))
    assert (len(counts.waits), len(counts.up), len(counts.down)) == expected


# what runs over batches


def test_measuring_moves_each_batch_once(bench: Bench):
    assert bench.counted(contract_of, bench.dense, bench.tiny.input_size) == (0, 0, 0)
    for count in (1, 3):
        assert bench.counted(feature_covariance, bench.dense, bench.batches(count)) == (1, count, 0)
    replayed, batches = Remembered(bench.dense), len(bench.loader())
    # images and labels; the logits come down once, to be replayed
    assert bench.counted(evaluate, bench.dense, bench.loader()) == (2, 2 * batches, 0)
    assert bench.counted(evaluate, replayed, bench.loader())[1:] == (batches, batches)
    told = bench.counted(evaluate, bench.dense, bench.loader(), reference=replayed.rewind_())
    assert told == (3 + batches, 3 * batches, 0)


def test_balance_moves_each_batch_once_and_waits_for_factorisations_alone(bench: Bench):
    groups = bench.contract.groups
    few, many = (bench.counted(balance_, copy.deepcopy(bench.dense), groups, bench.batches(count)) for count in (1, 3))
    assert few[0] == many[0] <= 3 * len(groups)
    assert (few[1:], many[1:]) == ((1, 0), (3, 0))


def test_order_and_scores_draw_labels_once_a_batch(bench: Bench):
    opened = open_groups(bench.dense, ("mlp_hidden", "attn_query", "attn_value"))
    readers = sum(bool(group.readers) for group in opened)
    for count in (1, 2):
        order = bench.counted(innovations_of, bench.dense, opened, bench.batches(count), draw())
        # a factor and an inverse of each reader, and which of its tokens are real; a batch's images and labels
        assert order[0] <= 3 * readers + count
        assert order[1:] == (1 + 2 * count, count)
        model = copy.deepcopy(bench.dense)
        gates = add_gates_(model, bench.contract.groups, open_groups(bench.dense), innovations=bench.result)
        score = bench.counted(fisher_scores, model, gates, bench.batches(count), draw())
        assert score == (1 + count, 2 * count, 1 + count)
        assert bench.counted(magnitude_scores, model, gates, bench.contract.groups)[1] <= len(gates.groups)


# trainings


@pytest.mark.parametrize("split", [0.7, 1.0], ids=["in turns", "together"])
def test_a_step_of_the_search_waits_for_nothing(bench: Bench, split: float):
    told = {"search_weight_lr": 1e-4, "search_split": split}
    model, config = copy.deepcopy(bench.dense), CONFIG.model_copy(update=told)
    opened = open_groups(model, ("mlp_hidden", "attn_query", "attn_value"))
    innovations = innovations_of(model, opened, bench.batches(1), draw())
    gates = add_gates_(model, bench.contract.groups, open_groups(model), innovations=innovations)
    batches, steps = bench.by_step()
    search_(
        model,
        gates,
        equal_scores(gates, bench.cost),
        bench.cost,
        make_objective(config, bench.dense, labelled=True),
        config,
        ON_DEVICE,
        batches,
        batches if split == 1 else lambda step: cycle(bench.loader()),
        feature_covariance(bench.dense, bench.batches(2)),
        pace=Pace(STEPS),
        listener=ignore,
    )
    # images, labels and noise, for both or for the weights and for the gates
    require_free_steps([*steps[1:], bench.counts], up=3 if split == 1 else 6)


def test_a_step_of_the_recovery_waits_for_nothing(bench: Bench):
    model, batches = cut_(copy.deepcopy(bench.dense), bench.plan), bench.by_step()
    recover.recover_(
        model,
        make_objective(CONFIG, bench.dense, labelled=True),
        CONFIG,
        ON_DEVICE,
        batches[0],
        bench.loader(),
        feature_covariance(bench.dense, bench.batches(2)),
        pace=Pace(STEPS),
        listener=ignore,
    )
    # images and labels; where held-out images are looked at, of each batch theirs and the dense logits
    require_free_steps([*batches[1][1:], bench.counts], up=2, up_of_check=3 * len(bench.loader()), waits_of_check=1)


def require_free_steps(steps: list[Counts], *, up: int, up_of_check: int = 0, waits_of_check: int = 0) -> None:
    assert len(steps) == STEPS
    for step, found in enumerate(steps[:-1], start=1):  # the last also holds what is done once at the end
        read, renewed = step % READS == 0, step % RENEWS == 0
        assert len(found.waits) == (1 + waits_of_check) * read + OF_RENEWAL * renewed, (step, found.waits)
        assert len(found.up) == up + up_of_check * read, (step, found.up)
        assert len(found.down) == read + renewed, (step, found.down)


# surgery


def test_certificate_cut_and_its_way_back_move_their_indices_once(bench: Bench):
    groups, plan, image = bench.contract.groups, bench.plan, bench.tiny.images(1).to(DEVICE)
    slots = sum(len(group.writers) for group in groups)
    certified = bench.counted(require_certificate, bench.dense, groups, plan, image)
    assert certified[0] <= slots * 2 + 3  # places of each slot in two ways; how far the output moved; the mask
    assert certified[1] <= slots * 6 + 1  # and the noise of its weight and bias
    pruned, dims = copy.deepcopy(bench.dense), index_map(bench.dense, groups, plan)
    sites = len(bench.contract.sites)
    assert bench.counted(cut_, pruned, plan)[1] <= sum(map(len, dims.values())) + 3 * sites
    assert bench.counted(pruned, image) == (0, 0, 0)
    expanded = copy.deepcopy(bench.dense)
    assert bench.counted(expand_, expanded, pruned, plan)[1] <= 4 * len(dims)
    assert bench.counted(expanded, image) == (0, 0, 0)
    masked = copy.deepcopy(bench.dense)
    gates = add_gates_(masked, groups, open_groups(masked))
    assert bench.counted(harden_, gates, plan)[1] == 1
    assert bench.counted(masked, image) == (0, 0, 0)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_refit_waits_for_no_linear_and_moves_each_batch_once(bench: Bench, epochs: int):
    groups, plan = bench.contract.groups, bench.plan
    blocks, branches = len(bench.contract.blocks), len(bench.contract.sites)
    fit = Reconstruction(epochs, 1e-3, 0, "refit") if epochs else None
    for count in (1, 2):
        pruned = cut_(copy.deepcopy(bench.dense), plan)
        waits, up, down = bench.counted(refit_, pruned, bench.dense, groups, plan, bench.batches(count), fit_block=fit)
        reads = -(-epochs * count // READS)
        # rows; whether a block differs; in which order a branch sees its tokens; of a reconstruction, error and figures
        assert waits <= 1 + blocks + 2 * branches + bool(epochs) * (2 + reads) * blocks
        assert up == 2 + 2 * count  # the first image and the rows; each batch at the start, and for the classifier
        assert down <= reads * blocks


def test_streams_may_be_kept_elsewhere_and_the_figures_are_those_of_the_cpu(bench: Bench):
    groups, plan, images = bench.contract.groups, bench.plan, bench.batches(2)
    kept: list[Any] = []

    def watch(block: nn.Module, before: list[Tensor], target: list[Tensor]) -> None:
        kept.append({stream.device.type for stream in (*before, *target)})

    networks = [
        refit_(cut_(copy.deepcopy(dense), plan), dense, groups, plan, images, keep=keep, fit_block=watch)
        for dense, keep in (
            (bench.dense, None),
            (bench.dense, on(torch.device("cpu"))),
            (bench.tiny.model(), None),
        )
    ]
    third = len(kept) // 3
    assert kept == [{DEVICE.type}] * third + [{"cpu"}] * 2 * third
    outputs = [network(images[0].to(next(network.parameters()).device)).cpu() for network in networks]
    assert torch.equal(outputs[0], outputs[1])
    assert relative_error(outputs[0], outputs[2]) <= 1e-3


def test_a_branch_that_is_timed_by_itself_waits_for_nothing(bench: Bench):
    assert bench.counted(branches_of, bench.dense, bench.contract.sites, bench.tiny.images(1).to(DEVICE)) == (0, 0, 0)
    for branch in bench.result[1].values():
        widths = {group.key: group.width if group.whole else group.span for group in branch.groups}
        bench.counted(branch.at, widths)
        assert bench.counted(bench.result) == (0, 0, 0)


# a run


def test_a_whole_run_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All stages, over the form in which their results are kept, which lies on the CPU."""
    monkeypatch.setitem(READ_EVERY, DEVICE.type, READ_EVERY["cuda"])
    monkeypatch.setattr(innovations_module, "ROUNDS", 8)
    monkeypatch.setattr(context, "open_accelerator", lambda *_, **__: ON_DEVICE)
    for stage in (opening, saving):  # a tracer needs tensors that are really there
        monkeypatch.setattr(stage, "count_macs", lambda model, size: count_macs(copy.deepcopy(model).cpu(), size))
    config = SHORT.model_copy(update={"search_steps": 2, "recover_steps": 2, "axes": CONFIG.axes})
    checkpoint = save(TINY[0], tmp_path / "dense.safetensors")
    with pretending() as counts:
        result = pipeline.compress(checkpoint, config, tmp_path / "run", ignore)
    assert (result.comparison.after.macs or 0) <= 0.8 * (result.comparison.before.macs or 0)
    assert not [place for place in counts.up if place.startswith("method/kernel_complexity")]


def test_attention_is_computed_at_the_widths_that_the_device_is_fast_at():
    assert kernel_widths([24, 24, 40], "cpu") == [40, 40, 40]
    assert kernel_widths([24, 24, 40], "cuda") == [24, 24, 40], "a GPU takes two widths"
    assert kernel_widths([6, 6, 17], "cuda") == [8, 8, 24]
