"""Reconstruction on top of the refit: nearer to the dense stream on the calibration images, for every family."""

import copy

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from kcrprune.config import load_config
from kcrprune.errors import ConfigError
from kcrprune.families import contract_of
from kcrprune.surgery.narrow import cut_
from kcrprune.surgery.refit import refit_
from kcrprune.training.reconstruct import Reconstruction
from tests.conftest import TINY, Tiny, random_plan
from tests.test_laws import FEW, SEEDS, each_tiny


def reconstruction(lr: float = 1e-3) -> Reconstruction:
    return Reconstruction(epochs=3, lr=lr, seed=0, stage="refit")


class Watched:
    """Squared error of each block by torch's own loss, before and after a reconstruction."""

    def __init__(self, lr: float) -> None:
        self.fit, self.errors = reconstruction(lr), []

    def __call__(self, block: nn.Module, before: list[Tensor], target: list[Tensor]) -> None:
        first = self.error(block, before, target)
        self.fit(block, before, target)
        self.errors.append((first, self.error(block, before, target)))

    @staticmethod
    def error(block: nn.Module, before: list[Tensor], target: list[Tensor]) -> float:
        return float(nn.functional.mse_loss(block(torch.cat(before)).double(), torch.cat(target).double()))


@each_tiny
@FEW
@given(seed=SEEDS)
def test_no_block_ends_farther_from_the_dense_stream_than_its_refit(tiny: Tiny, seed: int):
    model, images = tiny.model(seed), tiny.images(24, seed)
    plan = random_plan(model, "tiny", seed)
    watched = Watched(lr=3e-3)
    refit_(
        cut_(copy.deepcopy(model), plan),
        model,
        contract_of(model, tiny.input_size).groups,
        plan,
        images.split(8),
        fit_block=watched,
    )
    assert all(after <= before * (1 + 1e-6) for before, after in watched.errors)


def test_blocks_that_lost_much_come_nearer(tiny: Tiny):
    model, images = tiny.model(), tiny.images(32)
    plan = random_plan(model, "tiny", 1)
    watched = Watched(lr=1e-4)
    refit_(
        cut_(copy.deepcopy(model), plan),
        model,
        contract_of(model, tiny.input_size).groups,
        plan,
        images.split(8),
        fit_block=watched,
    )
    assert watched.errors
    assert all(after < before for before, after in watched.errors if before > 0.2)


def test_weights_that_end_farther_away_are_put_back():
    tiny = TINY[0]
    model, images = tiny.model(), tiny.images(16)
    plan = random_plan(model, "tiny", 1)
    networks = [
        refit_(
            cut_(copy.deepcopy(model), plan),
            model,
            contract_of(model, tiny.input_size).groups,
            plan,
            images.split(8),
            fit_block=fit,
        )
        for fit in (None, reconstruction(lr=10))
    ]
    refitted, diverged = (network.state_dict() for network in networks)
    assert all(torch.equal(diverged[name], tensor) for name, tensor in refitted.items())


def test_linears_alone_are_trained_and_left_without_gradients():
    block = TINY[0].model().get_submodule("blocks.0")
    first = copy.deepcopy(block.state_dict())
    stream = torch.randn(4, 5, 24)
    reconstruction()(block, [stream], [block(stream).detach() + 0.1 * torch.randn(4, 5, 24)])
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, first[name])}
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_without_a_refit_there_is_nothing_to_go_on_from():
    with pytest.raises(ConfigError, match="reconstruct_epochs train blocks on from their refit, and refit is off"):
        load_config(None, None, {"refit": False, "reconstruct_epochs": 2})
