"""Innovations of real networks: their statistics by another route, and a cut with its refit inside a network."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.families import Group, groups_of
from kcrprune.families.observed import watching
from kcrprune.plan import Axis
from kcrprune.surgery.gated import remove_gates_
from kcrprune.surgery.partial import read_by, real_tokens
from kcrprune.surgery.swap import linear_at, swap_
from kcrprune.training.innovations import LinearMoments, innovations_of, refitted_readers
from tests.tiny import TINY, Tiny, gated, open_groups, relative_error

AXES: tuple[Axis, ...] = ("mlp_hidden", "attn_query", "attn_value")


def found_in(model: nn.Module, batches: list[Tensor], axes: tuple[Axis, ...] = AXES):
    return innovations_of(model, open_groups(model, axes), batches, torch.Generator().manual_seed(0))


@torch.no_grad()
def seen_by(model: nn.Module, group: Group, images: Tensor) -> Tensor:
    """The inputs (tokens, I) of a reader, without window padding where the stream tells of it."""
    x = read_by(model, group.readers[0].owner, images).flatten(0, -2)
    if group.axis != "attn_value" or group.stream is None:
        return x
    return real_tokens(model, group.stream, group.site, images[:1]).of(x)


@pytest.mark.parametrize("axes", [AXES, ("mlp_io", "mlp_hidden", "heads"), ("attn_query",)])
def test_open_gates_leave_and_return_the_network(tiny: Tiny, axes: tuple[Axis, ...]):
    model, images = tiny.model(), tiny.images()
    with torch.no_grad():
        expected = model(images)
    before = copy.deepcopy(model.state_dict())
    found = found_in(model, [tiny.images(8)], axes)
    assert all(parameter.grad is None for parameter in model.parameters())
    wanted = [group for group in open_groups(model, axes) if group.axis in ("mlp_hidden", "attn_value")]
    assert len(found) == len(wanted)
    gates = gated(model, axes, innovations=found)
    with torch.no_grad():
        assert relative_error(model(images), expected) <= 1e-5
    remove_gates_(model, gates)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert before.keys() == model.state_dict().keys()


def test_moments_are_those_of_the_tokens_that_count(tiny: Tiny):
    model = tiny.model()
    batches = [tiny.images(3, 1), tiny.images(5, 2)]
    found = found_in(model, batches)
    for name, group in refitted_readers(open_groups(model, AXES)).items():
        x = seen_by(model, group, torch.cat(batches)).double()
        residuals = (x - x.mean(0)) @ found[name].analysis.double().T
        moments = torch.cov(residuals.T, correction=0)
        off_diagonal = moments - torch.diag(moments.diagonal())
        assert torch.allclose(found[name].mean.double(), x.mean(0), atol=1e-4)
        assert off_diagonal.abs().max() <= 0.02 * moments.diagonal().max()


def test_gradients_are_those_of_autograd(tiny_vit: Tiny):
    model = tiny_vit.model()
    linear = linear_at(model, "blocks.0.mlp.fc2")
    sums = LinearMoments(linear, torch.zeros(linear.weight.shape[1]))
    with watching(model, {"blocks.0.mlp.fc2": sums.see_inputs}):
        loss = model(tiny_vit.images(4)).square().sum()
    assert sums.output is not None
    gradient, bias = torch.autograd.grad(loss, [sums.output, linear.get_parameter("bias")])
    sums.see_gradient(gradient)
    assert sums.sums.tokens == 4 * 5
    assert torch.allclose(sums.sums.gradients.trace(), gradient.double().square().sum())
    assert torch.allclose(gradient.sum((0, 1)), bias, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_large_mean_costs_no_digits():
    linear = nn.Linear(3, 2)
    x = 1e3 + 1e-2 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    sums = LinearMoments(linear, x[0])
    for batch in x.split(100):
        sums.see_inputs(batch, linear(batch))
    mean, covariance = sums.mean_and_covariance()
    assert torch.allclose(covariance, torch.cov(x.double().T, correction=0), rtol=0.02, atol=1e-7)
    assert torch.allclose(mean, x.double().mean(0))
    _, moment = sums.mean_and_covariance(centred=False)
    assert torch.allclose(moment, x.double().T @ x.double() / 400)


@torch.no_grad()
def test_closed_gates_are_a_cut_and_its_refit_inside_a_network(tiny: Tiny):
    model = tiny.model()
    group, images = next(g for g in groups_of(model) if g.axis == "mlp_hidden"), tiny.images(16)
    name = group.readers[0].owner
    with torch.enable_grad():
        found = innovations_of(model, [group], [images], torch.Generator().manual_seed(0))
    x = read_by(model, name, images).flatten(0, -2).double()
    first = found[name].analysis.ne(0).sum(1).argsort(descending=True)[: group.width // 2]  # predicted by most
    network = copy.deepcopy(model)
    gates = gated(network, ["mlp_hidden"], innovations=found)
    mask = torch.ones_like(gates.logits)
    mask[gates.slices[group.key].start + first] = 0
    gates.harden_(mask)
    kept = torch.ones(group.width, dtype=torch.bool).index_fill(0, first, False)
    design = torch.cat([x[:, kept], torch.ones(len(x), 1)], dim=1)
    old = linear_at(model, name)
    solution = torch.linalg.lstsq(design, old(x.float()).double()).solution.float()  # (I + 1, O)
    refitted = nn.Linear(group.width, len(old.weight))
    refitted.weight.zero_()
    refitted.weight[:, kept] = solution[:-1].T
    refitted.bias.copy_(solution[-1])
    swap_(model, name, refitted)
    assert relative_error(network(images), model(images)) <= 0.02


def test_an_open_gate_of_an_image_has_the_gradient_of_the_gate_that_all_share(tiny: Tiny):
    model, images = tiny.model(), tiny.images(2)
    gates = gated(model, AXES, innovations=found_in(model, [tiny.images(8)]))
    gates.open_per_image_(len(images))
    [of_each] = torch.autograd.grad(model(images).square().sum(), [gates.value])
    for image, gradient in zip(images, of_each, strict=True):
        gates.value = torch.ones_like(gates.logits, requires_grad=True)
        [shared] = torch.autograd.grad(model(image[None]).square().sum(), [gates.value])
        assert relative_error(gradient, shared) <= 1e-4


def test_a_linear_without_a_bias_has_no_mean_to_keep():
    tiny = TINY[0]
    model = tiny.model()
    linear_at(model, "blocks.0.mlp.fc2").register_parameter("bias", None)
    found = found_in(model, [tiny.images(8)])
    assert (found["blocks.0.mlp.fc2"].mean == 0).all()
    assert (found["blocks.0.attn.proj"].mean != 0).any()


def test_the_ranking_follows_the_refit():
    assert RunConfig().ranked_by == "innovation"
    assert RunConfig(refit=False).ranked_by == "fisher"
    assert RunConfig(ranking="fisher").ranked_by == "fisher"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"ranking": "innovation", "refit": False},
            "ranking innovation prices what a refit makes up for, and refit is off",
        ),
        ({"ranking": "equal", "search_steps": 0}, "ranking equal ranks nothing by itself; give search_steps"),
    ],
)
def test_rankings_that_mean_nothing_are_refused(settings, sentence):
    from kcrprune.config import load_config

    with pytest.raises(ConfigError, match=sentence):
        load_config(None, None, settings)


def test_sums_that_do_not_fit_together_are_taken_in_turns_and_end_in_the_same_bits(tiny_vit: Tiny, monkeypatch):
    model, batches, passes = tiny_vit.model(), list(tiny_vit.images(8).split(4)), []
    open_ = open_groups(model, ["mlp_hidden", "attn_value"])
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *inputs: passes.append(len(inputs[1])) or forward(*inputs))
    whole, turns = (
        innovations_of(model, open_, batches, torch.Generator().manual_seed(0), room=room) for room in (1e9, 1.0)
    )
    assert passes.count(4) == 2 * (1 + len(whole))  # the others look at one image
    for name, found in whole.items():
        assert all(torch.equal(tensor, vars(turns[name])[part]) for part, tensor in vars(found).items())
