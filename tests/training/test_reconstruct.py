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
from tests.test_laws import FEW, SEEDS, each_tiny
from tests.tiny import TINY, Tiny, random_plan


class Watched:
    """Squared error of each block by torch's own loss, before and after a reconstruction."""

    def __init__(self, lr: float) -> None:
        self.fit, self.errors = Reconstruction(epochs=2, lr=lr, seed=0, stage="refit"), []

    def __call__(self, block: nn.Module, before: list[Tensor], target: list[Tensor]) -> None:
        first = self.error(block, before, target)
        self.fit(block, before, target)
        self.errors.append((first, self.error(block, before, target)))

    @staticmethod
    def error(block: nn.Module, before: list[Tensor], target: list[Tensor]) -> float:
        return float(nn.functional.mse_loss(block(torch.cat(before)).double(), torch.cat(target).double()))


def reconstructed(tiny: Tiny, seed: int, fit: Watched | Reconstruction | None) -> nn.Module:
    """A network that was cut, refitted and reconstructed on 16 images."""
    model, images = tiny.model(seed), tiny.images(16, seed)
    plan, groups = random_plan(model, "tiny", seed), contract_of(model, tiny.input_size).groups
    return refit_(cut_(copy.deepcopy(model), plan), model, groups, plan, images.split(8), fit_block=fit)


@each_tiny
@FEW
@given(seed=SEEDS)
def test_no_block_ends_farther_from_the_dense_stream_than_its_refit(tiny: Tiny, seed: int):
    watched = Watched(lr=3e-3)
    reconstructed(tiny, seed, watched)
    assert all(after <= before * (1 + 1e-6) for before, after in watched.errors)


def test_blocks_that_lost_much_come_nearer(tiny: Tiny):
    watched = Watched(lr=1e-4)
    reconstructed(tiny, 1, watched)
    assert watched.errors
    assert all(after < before for before, after in watched.errors if before > 0.2)


def test_weights_that_end_farther_away_are_put_back(tiny_vit: Tiny):
    fits = (None, Reconstruction(epochs=3, lr=10, seed=0, stage="refit"))
    refitted, diverged = (reconstructed(tiny_vit, 1, fit).state_dict() for fit in fits)
    assert all(torch.equal(diverged[name], tensor) for name, tensor in refitted.items())


def test_linears_alone_are_trained_and_left_without_gradients():
    block = TINY[0].model().get_submodule("blocks.0")
    first = copy.deepcopy(block.state_dict())
    stream = torch.randn(4, 5, 24)
    Reconstruction(epochs=3, lr=1e-3, seed=0, stage="refit")(
        block, [stream], [block(stream).detach() + 0.1 * torch.randn(4, 5, 24)]
    )
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, first[name])}
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_without_a_refit_there_is_nothing_to_go_on_from():
    with pytest.raises(ConfigError, match="reconstruct_epochs train blocks on from their refit, and refit is off"):
        load_config(None, None, {"refit": False, "reconstruct_epochs": 2})
