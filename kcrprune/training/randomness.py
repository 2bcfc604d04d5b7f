"""Randomness by address: every draw follows from where it is made, and from nothing that was drawn before.

An address is a seed, a stage, a step of it and what is drawn there. Its hash seeds a fresh generator, which nobody
keeps: a run that goes on at some step, with more or fewer processes that load images, draws what it would have drawn.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

from kcrprune.plan import canonical_json


def number(seed: int, stage: str, step: int, what: str) -> int:
    """64 bits for an address."""
    text = canonical_json([seed, stage, step, what])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def generator(seed: int, stage: str, step: int, what: str) -> torch.Generator:
    """A fresh generator, on the CPU, for an address."""
    return torch.Generator().manual_seed(number(seed, stage, step, what))


@contextmanager
def seeded(seed: int, stage: str, step: int, what: str, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the generators that strangers' code draws from start at an address; outside they are as they were.

    They are those of `random` and numpy, torch's for the CPU and, if it is a GPU, that of `device`.
    """
    start = number(seed, stage, step, what)
    generators = [torch.default_generator, *_of(device)]
    before = random.getstate(), np.random.get_state(), [each.get_state() for each in generators]
    random.seed(start)
    np.random.seed(start % 2**32)
    for each in generators:
        each.manual_seed(start)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        for each, state in zip(generators, before[2], strict=True):
            each.set_state(state)


def _of(device: torch.device | None) -> list[torch.Generator]:
    if device is None or device.type != "cuda":
        return []
    torch.cuda.init()  # before that there are none
    return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]
