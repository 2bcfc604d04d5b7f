"""Draws follow from their address alone, and leave no trace."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kcrprune.training.randomness import generator, number, seeded

ADDRESS: tuple[int, str, int, str] = (3, "recover", 7, "order")
OTHERS: list[tuple[int, str, int, str]] = [
    (4, "recover", 7, "order"),
    (3, "search", 7, "order"),
    (3, "recover", 8, "order"),
    (3, "recover", 7, "dropout"),
    (37, "recover", 7, "order"),
]


def drawn_globally() -> list[Any]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


@given(st.integers(0, 2**40), st.text(), st.integers(0, 2**40), st.text())
def test_numbers_have_64_bits_and_differ_with_every_part_of_the_address(seed, stage, step, what):
    found = number(seed, stage, step, what)
    assert 0 <= found < 2**64
    others = [(seed + 1, stage, step, what), (seed, stage + "x", step, what), (seed, stage, step + 1, what)]
    assert found not in [number(*other) for other in [*others, (seed, stage, step, what + "x")]]


@pytest.mark.parametrize("other", OTHERS)
def test_generators_of_one_address_agree_and_those_of_two_do_not(other: tuple[int, str, int, str]):
    addresses = (ADDRESS, ADDRESS, other)
    first, again, different = (torch.rand(5, generator=generator(*address)) for address in addresses)
    assert torch.equal(first, again)
    assert not torch.equal(first, different)


def test_global_generators_start_at_the_address_whatever_was_drawn_before():
    found = []
    for history in range(3):
        for _ in range(history):
            drawn_globally()
        with seeded(*ADDRESS):
            found.append(drawn_globally())
    assert found[0] == found[1] == found[2]
    with seeded(*OTHERS[0]):
        assert all(a != b for a, b in zip(found[0], drawn_globally(), strict=True))


def test_global_generators_go_on_as_if_nothing_had_been_drawn():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = drawn_globally()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError), seeded(*ADDRESS):
        drawn_globally().index(1 / 0)
    assert drawn_globally() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_generator_of_a_gpu_is_seeded_and_put_back():
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    found = []
    for _ in range(2):
        with seeded(*ADDRESS, device):
            found.append(torch.rand(4, device=device))
    assert torch.equal(*found)
    assert torch.equal(torch.cuda.get_rng_state(), before)
