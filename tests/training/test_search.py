"""The search meets its budget at every step, repeats bit for bit, and recovery never ends worse."""

import copy
import re
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError, DataError, DivergedError
from kcrprune.events import Event, StepDone
from kcrprune.method.kernel_complexity import relative_tnn
from kcrprune.method.objective import Objective, feature_distance, logit_distance
from kcrprune.method.shift import ExpectedMacs
from kcrprune.plan import AXES, Axis
from kcrprune.training import precision
from kcrprune.training.features import KernelWatch, feature_covariance
from kcrprune.training.losses import HeldOut, make_objective
from kcrprune.training.pace import Pace
from kcrprune.training.precision import open_accelerator
from kcrprune.training.randomness import generator
from kcrprune.training.recover import recover_
from kcrprune.training.scores import fisher_scores
from kcrprune.training.search import learned_scores, search_, start_logits_
from tests.tiny import Tiny, cost_of, gated

CONFIG = RunConfig(target_flops=0.8, axes=("mlp_hidden", "attn_value"), device="cpu", kernel_weight=0.5, kernel_every=2)


def batches(tiny: Tiny, seed: int = 0) -> DataLoader:
    labels = torch.arange(12) % 5
    return DataLoader(TensorDataset(tiny.images(12, seed), labels), 4)


def from_step(tiny: Tiny, seed: int = 0) -> Callable[[int], Iterator[Any]]:
    """Those batches again and again, from a step on."""
    return lambda step: islice(cycle(batches(tiny, seed)), step, None)


def searched(tiny: Tiny, config: RunConfig, events: list[Event], at_once: int = 1000, steps: int = 5):
    """What a search of some steps finds where memory suffices for so many images at once."""
    config = config.model_copy(update={"target_flops": tiny.target})
    dense = tiny.model()
    cost = cost_of(dense, tiny)
    model = copy.deepcopy(dense)
    gates = gated(model, config.axes)
    scores = fisher_scores(model, gates, [tiny.images(4)], torch.Generator().manual_seed(0))
    objective = make_objective(config, dense, labelled=True)

    def limited(images: torch.Tensor) -> torch.Tensor:
        if len(images) > at_once:
            raise torch.OutOfMemoryError
        return dense(images)

    objective.dense = limited
    found = search_(
        model,
        gates,
        scores,
        cost,
        objective,
        config,
        open_accelerator("cpu", "fp32"),
        from_step(tiny, 1),
        from_step(tiny, 2),
        feature_covariance(dense, [tiny.images(8)]),
        pace=Pace(steps),
        listener=events.append,
    )
    return dense, model, gates, found


def test_the_budget_is_met_at_every_step_and_every_figure_is_told(tiny: Tiny):
    events: list[Event] = []
    searched(tiny, CONFIG, events)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5]
    for event in steps:
        assert event.values["expected_macs"] == pytest.approx(tiny.target, abs=1e-3)
        assert {"loss", "labels", "distill", "temperature"} <= set(event.values)
    assert ["kc" in event.values for event in steps] == [False, True, False, True, False]
    assert all("kernel" in event.values for event in steps)


def test_same_seed_same_logits_and_frozen_weights(tiny_vit: Tiny):
    frozen = CONFIG.model_copy(update={"search_weight_lr": 0.0})
    first, second = (searched(tiny_vit, frozen, []) for _ in range(2))
    assert torch.equal(first[2].logits, second[2].logits)
    dense, model = first[0].state_dict(), first[1].state_dict()
    assert all(torch.equal(dense[name], model[name]) for name in dense)
    assert first[2].logits.any()


@pytest.mark.parametrize("split", [0.7, 1.0], ids=["in turns", "together"])
def test_a_search_in_parts_of_a_batch_is_that_of_whole_batches(tiny_vit: Tiny, split: float):
    config = CONFIG.model_copy(update={"search_weight_lr": 1e-4, "search_split": split, "kernel_weight": 0.0})
    whole, parts = (searched(tiny_vit, config, [], at_once)[2] for at_once in (1000, 2))
    assert torch.allclose(whole.logits, parts.logits, atol=1e-3)


def test_weights_learn_in_turns_where_they_have_images_of_their_own(tiny_vit: Tiny):
    events: list[Event] = []
    in_turns = CONFIG.model_copy(update={"search_weight_lr": 1e-3, "search_split": 0.7})
    dense, model, *_ = searched(tiny_vit, in_turns, events)
    moved = model.state_dict()
    assert any(not torch.equal(value, moved[name]) for name, value in dense.state_dict().items())
    told = [event.values for event in events if isinstance(event, StepDone)]
    assert all(values["weights_loss"] != values["loss"] for values in told), "of other gates and other images"


def test_a_step_of_both_is_one_of_adam_on_gates_and_of_adamw_on_weights_by_the_same_gradient(tiny_vit: Tiny):
    config = CONFIG.model_copy(update={"search_weight_lr": 1e-3, "clip_grad": 1.0})
    dense, model, gates, _ = searched(tiny_vit, config, [], steps=1)
    cost, ours = cost_of(dense, tiny_vit), copy.deepcopy(dense)
    own = gated(ours, config.axes)
    start_logits_(
        own,
        fisher_scores(ours, own, [tiny_vit.images(4)], torch.Generator().manual_seed(0)),
        cost,
        config.search_spread,
    )
    expected, budget = ExpectedMacs(cost, own), tiny_vit.target * cost.dense
    expected.shift_(own.logits.data, budget)
    before, weights = own.logits.detach().clone(), dict(ours.requires_grad_(True).named_parameters())
    objective = make_objective(config, dense, labelled=True)
    KernelWatch(objective, feature_covariance(dense, [tiny_vit.images(8)]), config.kernel_rank, config.kernel_every)
    own.sample_(
        config.temperature, torch.rand(own.logits.shape, generator=generator(config.seed, "search", 0, "gates"))
    )
    objective(ours, *next(from_step(tiny_vit, 2)(0))).total.backward()
    torch.nn.utils.clip_grad_norm_([own.logits, *weights.values()], config.clip_grad)
    undecayed = cast(Any, ours).no_weight_decay
    decays = {name for name, weight in weights.items() if weight.ndim > 1 and name not in undecayed()}
    for names, decay in ((decays, config.weight_decay), (weights.keys() - decays, 0.0)):
        torch.optim.AdamW([weights[name] for name in names], lr=1e-3, weight_decay=decay).step()
    torch.optim.Adam([own.logits], lr=config.search_lr).step()
    expected.follow_(own.logits.data, before, budget)
    assert torch.allclose(gates.logits, own.logits, atol=1e-5)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, weights[name], atol=1e-6), name
    assert not torch.equal(gates.logits, before)


def test_logits_start_in_the_order_of_score_for_a_mac_and_come_back_as_scores(tiny_vit: Tiny):
    model = tiny_vit.model()
    cost = cost_of(model, tiny_vit)
    gates = gated(model, CONFIG.axes)
    scores = fisher_scores(model, gates, [tiny_vit.images(4)], torch.Generator().manual_seed(0))
    scale = start_logits_(gates, scores, cost, spread=8.0)
    expected = ExpectedMacs(cost, gates)
    expected.shift_(gates.logits.data, 0.75 * cost.dense)
    assert float(expected(gates.logits.detach())) == pytest.approx(0.75 * cost.dense, rel=1e-4)
    back = learned_scores(gates, cost, scale)
    ratios = []
    for key, score in scores.items():
        given, returned = score.flatten().double(), back[key].flatten()
        order = given.argsort()
        assert (returned[order].diff() >= 0).all()
        ratios.append(returned / given)
    everything = torch.cat(ratios)  # one price for all, but for the few that were clamped
    assert ((everything / everything.median() - 1).abs() < 1e-3).float().mean() > 0.95


def test_channels_that_are_worth_nothing_leave_the_others_their_spread(tiny_vit: Tiny):
    model = tiny_vit.model()
    cost = cost_of(model, tiny_vit)
    gates = gated(model, CONFIG.axes)
    scores = fisher_scores(model, gates, [tiny_vit.images(4)], torch.Generator().manual_seed(0))
    for score in scores.values():
        score.view(-1)[::3] = 0  # cut by an earlier stage
    start_logits_(gates, scores, cost, spread=8.0)
    logits, worth = gates.logits.detach(), gates.flat(scores) > 0
    assert float(logits[worth].std()) == pytest.approx(8.0, rel=0.1)
    assert (logits[~worth] == -24).all()


@pytest.mark.parametrize("axes", [("mlp_hidden", "attn_query", "attn_value"), AXES], ids=["default", "every"])
def test_one_shift_is_that_of_a_bisection_in_few_operators(tiny: Tiny, axes: tuple[Axis, ...]):
    cost = cost_of(tiny.model(), tiny)
    gates = gated(tiny.model(), axes)
    expected, target = ExpectedMacs(cost, gates), tiny.target * cost.dense
    gates.logits.data.normal_(std=3, generator=torch.Generator().manual_seed(0))
    low, high, start = -100.0, 100.0, gates.logits.detach().double()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if float(expected(start + middle)) > target else (middle, high)
    logits = gates.logits.detach().clone()
    expected.shift_(logits, target)
    assert torch.allclose(logits.double(), start + low, atol=1e-5)
    moved = logits + 0.05 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    with Operators() as counted:
        expected.follow_(moved, logits, target)
    assert float(expected(moved)) == pytest.approx(target, rel=1e-5)
    assert counted.count < 100


class Operators(TorchDispatchMode):
    """Counts the operators that do work; views do none."""

    VIEWS = (
        "view",
        "_unsafe_view",
        "detach",
        "expand",
        "slice",
        "select",
        "t",
        "transpose",
        "alias",
        "unsqueeze",
        "split",
    )
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is '2' in the environment.*without a launcher \(`unset WORLD_SIZE`"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is '4'"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is '0'"),
        ({"WORLD_SIZE": "nonsense", "LOCAL_RANK": "1"}, r"`unset WORLD_SIZE LOCAL_RANK`"),
    ],
)
def test_what_a_launcher_sets_is_told_of_and_not_waited_for(monkeypatch, left, told):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        open_accelerator("cpu", "fp32")


def test_recovery_ends_with_the_best_weights_that_it_saw(tiny: Tiny):
    dense = tiny.model()
    torch.manual_seed(0)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    config = CONFIG.model_copy(update={"lr": 1e-3, "task": "distill"})
    objective = make_objective(config, dense, labelled=True)
    found = recover_(
        model,
        objective,
        config,
        open_accelerator("cpu", "fp32"),
        from_step(tiny),
        batches(tiny, 7),
        feature_covariance(dense, [tiny.images(8)]),
        pace=Pace(8),
        listener=lambda event: None,
    )
    held_out = [row["held_out"] for row in found.history if "held_out" in row]
    assert found.loss_after == pytest.approx(min([found.loss_before, *held_out]))
    objective.basis = None
    with torch.no_grad():
        total = sum(float(objective(model, x, y).total) * len(x) for x, y in batches(tiny, 7)) / 12
    assert total == pytest.approx(found.loss_after, rel=1e-4)


def test_the_parts_of_the_held_out_images_add_up_to_their_loss(tiny_vit: Tiny):
    dense, model, loader = tiny_vit.model(), tiny_vit.model(1), batches(tiny_vit, 7)
    measure = HeldOut(make_objective(CONFIG, dense, labelled=True), loader, torch.device("cpu"))
    parts = measure.parts(model)
    assert parts["loss"][:, 1].tolist() == [4, 4, 4]
    assert float(parts["loss"][:, 0].sum()) / 12 == pytest.approx(measure.loss(model))
    assert torch.allclose(parts["loss"][:, 0], parts["labels"][:, 0] + parts["distill"][:, 0])
    with torch.no_grad():
        expected = [F.cross_entropy(model(x), y, reduction="sum") for x, y in loader]
    assert torch.allclose(parts["labels"][:, 0].float(), torch.stack(expected), rtol=1e-4)


@pytest.mark.parametrize("rate", [10.0, 1e30])
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_rate_that_ruins_the_network_leaves_it_as_it_was_if_the_best_is_kept(
    tiny_vit: Tiny, keep_best: bool, rate: float
):
    dense = tiny_vit.model()
    model = copy.deepcopy(dense)
    config = CONFIG.model_copy(update={"lr": rate, "task": "distill", "warmup_steps": 0, "keep_best": keep_best})
    found = recover_(
        model,
        make_objective(config, dense, labelled=True),
        config,
        open_accelerator("cpu", "fp32"),
        from_step(tiny_vit),
        batches(tiny_vit, 7),
        feature_covariance(dense, [tiny_vit.images(8)]),
        pace=Pace(4),
        listener=lambda event: None,
    )
    diverged = rate > 10
    assert found.kept_step == (0 if keep_best or diverged else 4)
    same = all(torch.equal(value, model.state_dict()[name]) for name, value in dense.state_dict().items())
    assert same == (keep_best or diverged)
    assert (found.stopped is not None) == diverged
    if found.stopped:
        assert re.match(r"recover, step \d: \w+ is (nan|inf), so the training diverged; a lower", found.stopped)


def test_features_that_are_no_numbers_are_refused(tiny_vit: Tiny):
    model = tiny_vit.model()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="features of 8 images are not finite numbers"):
        feature_covariance(model, [tiny_vit.images(8)])


def test_a_search_that_diverges_is_stopped_where_it_did(tiny_vit: Tiny):
    with pytest.raises(DivergedError, match="search, step 1: loss is nan"):
        searched(tiny_vit, CONFIG.model_copy(update={"distill_temperature": 1e-40}), [])


def test_the_kernel_term_is_exact_under_autocast(tiny_vit: Tiny):
    dense, basis = tiny_vit.model().eval(), torch.linalg.qr(torch.randn(24, 3)).Q
    objective = Objective(dense, use_labels=False, use_dense=True, kernel_weight=1.0, basis=basis)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = objective(dense, tiny_vit.images(4), torch.full((4,), -1))
    assert loss.features.dtype == torch.float32
    assert float(loss.parts["kernel"]) == pytest.approx(
        float(relative_tnn(loss.features.double(), basis.double())), rel=1e-5
    )


def test_the_parts_of_the_loss_add_up(tiny_vit: Tiny):
    dense, model = tiny_vit.model(), tiny_vit.model(1)
    basis = torch.linalg.qr(torch.randn(24, 3)).Q
    objective = Objective(dense, use_labels=True, use_dense=True, kernel_weight=2.0, basis=basis)
    loss = objective(model, tiny_vit.images(4), torch.tensor([0, 1, -1, 2]))
    parts = {name: float(part) for name, part in loss.parts.items()}
    assert parts["loss"] == pytest.approx(parts["labels"] + parts["distill"] + 2.0 * parts["kernel"], rel=1e-5)
    same = objective(dense, tiny_vit.images(4), torch.zeros(4, dtype=torch.long))
    assert float(same.parts["distill"]) == pytest.approx(0)


def test_distances_are_zero_only_at_the_dense_output():
    wanted = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for distance in (logit_distance, feature_distance):
        assert float(distance(wanted, wanted)) == pytest.approx(0, abs=1e-6)
        assert float(distance(wanted * 0.5, wanted)) > 0
    assert float(feature_distance(torch.zeros(3, 4), wanted)) == pytest.approx(1)


def test_a_device_or_task_that_is_not_to_be_had_is_refused(tiny_vit: Tiny):
    with pytest.raises(ConfigError, match=r"device 'cuda:99' is not here"):
        open_accelerator("cuda:99", "fp32")
    with pytest.raises(ConfigError, match="task 'labels' needs labelled images"):
        make_objective(CONFIG.model_copy(update={"task": "labels"}), tiny_vit.model(), labelled=False)


@pytest.mark.parametrize(("says", "expected"), [(None, "cuda"), ("CUDA error: out of order\nmore", "cpu")])
def test_auto_takes_a_gpu_only_where_it_works(says: str | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(precision, "gpu_fault", lambda device: says)
    assert precision.available_device("auto") == expected
    if says:
        with pytest.raises(ConfigError, match=r"'cuda:0' is here but does not work \(CUDA error: out of order"):
            precision.available_device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU works")
def test_a_gpu_that_does_not_work_says_why_in_one_line():
    precision.gpu_fault.cache_clear()
    assert "\n" not in (precision.gpu_fault("cuda") or "\n")


@pytest.mark.parametrize(("wanted", "rounded"), [("auto", True), ("bf16", True), ("fp32", False)])
def test_float32_is_rounded_in_a_run_unless_it_is_asked_for(wanted: str, rounded: bool):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with precision.arithmetic(CONFIG.model_copy(update={"precision": wanted, "deterministic": True})):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (rounded, rounded)
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    assert not torch.are_deterministic_algorithms_enabled()
