"""A refit that goes on behind a block ends, bit by bit, where one that was not stopped does."""

import copy

import torch

from kcrprune.families import contract_of
from kcrprune.surgery.narrow import cut_
from kcrprune.surgery.refit import refit_
from kcrprune.training.reconstruct import Reconstruction
from tests.tiny import Tiny, random_plan


def test_a_refit_goes_on_behind_any_block(tiny: Tiny):
    model, images = tiny.model(), [tiny.images(4, seed) for seed in range(2)]
    plan, groups = random_plan(model, "tiny", 1), contract_of(model, tiny.input_size).groups
    fit = Reconstruction(epochs=1, lr=1e-3, seed=0, stage="refit")
    pruned, states = cut_(copy.deepcopy(model), plan), {}

    def kept(done: int) -> None:
        states[done] = copy.deepcopy(pruned.state_dict())

    refit_(pruned, model, groups, plan, images, fit_block=fit, on_block=kept)
    assert len(states) > 1
    for done, state in states.items():
        again, told = cut_(copy.deepcopy(model), plan), list[int]()
        again.load_state_dict(state)
        refit_(again, model, groups, plan, images, fit_block=fit, on_block=told.append, begin=done)
        assert told == list(states), "the streams run through all"
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in pruned.state_dict().items())
