"""Innovations of real networks: their statistics by another route, and a cut with its refit inside a network."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kcrprune.config import RunConfig
from kcrprune.errors import ConfigError
from kcrprune.families import BlockSite, sites
from kcrprune.plan import Axis
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.swap import linear_at, swap_
from kcrprune.surgery.tokens import input_of, real_tokens
from kcrprune.training.innovations import LinearMoments, innovations_of
from tests.conftest import TINY, Tiny, relative_error

AXES: tuple[Axis, ...] = ("mlp_hidden", "attn_query", "attn_value")


def open_axes(found: tuple[BlockSite, ...], axes: tuple[Axis, ...] = AXES) -> dict[str, list[Axis]]:
    return {site.name: [axis for axis in site.axes if axis in axes] for site in found}


def seen_by(model: nn.Module, site: BlockSite, name: str, images: Tensor) -> Tensor:
    """The inputs (tokens, I) of a linear, without window padding."""
    with torch.no_grad():
        x = input_of(model, name, images).flatten(0, -2)
        if name != site.proj:
            return x
        stream = input_of(model, site.name, images)
        return x[real_tokens(model.get_submodule(site.name), site, stream)]


@pytest.mark.parametrize("axes", [AXES, ("mlp_io", "mlp_hidden", "heads"), ("attn_query",)])
def test_open_gates_leave_and_return_the_network(tiny: Tiny, axes: tuple[Axis, ...]):
    model, images = tiny.model(), tiny.images()
    with torch.no_grad():
        expected = model(images)
    before = copy.deepcopy(model.state_dict())
    allowed = open_axes(sites(model), axes)
    found = innovations_of(model, allowed, sites(model), [tiny.images(8)], torch.Generator().manual_seed(0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(found) == sum(("mlp_hidden" in a) + ("attn_value" in a and "heads" not in a) for a in allowed.values())
    gates = add_gates_(model, axes, innovations=found)
    with torch.no_grad():
        assert relative_error(model(images), expected) <= 1e-5
    remove_gates_(model, gates)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert before.keys() == model.state_dict().keys()


def test_moments_are_those_of_the_tokens_that_count(tiny: Tiny):
    model = tiny.model()
    batches = [tiny.images(3, 1), tiny.images(5, 2)]
    found = innovations_of(model, open_axes(sites(model)), sites(model), batches, torch.Generator().manual_seed(0))
    for site in sites(model):
        for name in (site.fc2, site.proj):
            if name in found:
                x = seen_by(model, site, name, torch.cat(batches)).double()
                residuals = (x - x.mean(0)) @ found[name].analysis.double().T
                moments = torch.cov(residuals.T, correction=0)
                off_diagonal = moments - torch.diag(moments.diagonal())
                assert torch.allclose(found[name].mean.double(), x.mean(0), atol=1e-4)
                assert off_diagonal.abs().max() <= 0.02 * moments.diagonal().max()


def test_gradients_are_those_of_autograd(tiny_vit: Tiny):
    model = tiny_vit.model()
    linear = linear_at(model, "blocks.0.mlp.fc2")
    sums = LinearMoments(linear)
    hook = linear.register_forward_hook(sums.see_inputs)
    loss = model(tiny_vit.images(4)).square().sum()
    hook.remove()
    assert sums.output is not None
    gradient, bias = torch.autograd.grad(loss, [sums.output, linear.bias])
    sums.see_gradient(gradient)
    assert sums.tokens == 4 * 5
    assert torch.allclose(sums.gradients.trace(), gradient.double().square().sum())
    assert torch.allclose(gradient.sum((0, 1)), bias, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_large_mean_costs_no_digits():
    linear = nn.Linear(3, 2)
    x = 1e3 + 1e-2 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    sums = LinearMoments(linear)
    for batch in x.split(100):
        sums.see_inputs(linear, (batch,), linear(batch))
    mean, covariance = sums.mean_and_covariance()
    assert torch.allclose(covariance, torch.cov(x.double().T, correction=0), rtol=0.02, atol=1e-7)
    assert torch.allclose(mean, x.double().mean(0))
    _, moment = sums.mean_and_covariance(centred=False)
    assert torch.allclose(moment, x.double().T @ x.double() / 400)


@torch.no_grad()
def test_closed_gates_are_a_cut_and_its_refit_inside_a_network(tiny: Tiny):
    model = tiny.model()
    site, images = sites(model)[0], tiny.images(16)
    allowed: dict[str, list[Axis]] = {site.name: ["mlp_hidden"]}
    with torch.enable_grad():
        found = innovations_of(model, allowed, sites(model), [images], torch.Generator().manual_seed(0))
    x = input_of(model, site.fc2, images).flatten(0, -2).double()
    first = found[site.fc2].analysis.ne(0).sum(1).argsort(descending=True)[: site.hidden // 2]  # predicted by most
    gated = copy.deepcopy(model)
    gates = add_gates_(gated, ["mlp_hidden"], innovations=found)
    for gate_site, _, gate in gates:
        gate.harden_(torch.ones_like(gate.logits).index_fill(0, first, 0) if gate_site == site else gate.value)
    kept = torch.ones(site.hidden, dtype=torch.bool).index_fill(0, first, False)
    design = torch.cat([x[:, kept], torch.ones(len(x), 1)], dim=1)
    old = linear_at(model, site.fc2)
    solution = torch.linalg.lstsq(design, old(x.float()).double()).solution.float()  # (I + 1, O)
    refitted = nn.Linear(site.hidden, old.out_features)
    refitted.weight.zero_()
    refitted.weight[:, kept] = solution[:-1].T
    refitted.bias.copy_(solution[-1])
    swap_(model, site.fc2, refitted)
    assert relative_error(gated(images), model(images)) <= 0.02


def test_a_linear_without_a_bias_has_no_mean_to_keep():
    tiny = TINY[0]
    model = tiny.model()
    site = sites(model)[0]
    linear_at(model, site.fc2).register_parameter("bias", None)
    found = innovations_of(
        model, open_axes(sites(model)), sites(model), [tiny.images(8)], torch.Generator().manual_seed(0)
    )
    assert (found[site.fc2].mean == 0).all()
    assert (found[site.proj].mean != 0).any()


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
        ({"ranking": "equal"}, "ranking equal ranks nothing by itself; give search_steps"),
    ],
)
def test_rankings_that_mean_nothing_are_refused(settings, sentence):
    from kcrprune.config import load_config

    with pytest.raises(ConfigError, match=sentence):
        load_config(None, None, settings)
