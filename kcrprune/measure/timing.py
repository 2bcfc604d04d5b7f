"""Wall time of networks that are called in turn, and what can be said about the ratio of two."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import comb
from statistics import median, quantiles

import torch
from torch import Tensor

from kcrprune.measure.report import Timing

WARM_UP = 3  # rounds that are not counted
FEWEST = 7  # rounds: fewer pairs give no interval of 95 %
MOST = 200  # rounds: more tell nothing new
TAIL = 0.025  # beyond either end of the interval

Call = Callable[[Tensor], object]


def in_turn(
    calls: Sequence[tuple[Call, Tensor]],
    *,
    seconds: float,
    fewest: int = FEWEST,
    most: int = MOST,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds of each call, (calls, rounds): in each round each once, in every other round backwards.

    What slows the machine for a while so slows all of them. Rounds are made for about so many seconds, within
    `fewest` and `most`, after some that are not counted. Work that is queued on the images' device counts. `clock`
    tells seconds.
    """
    with torch.inference_mode():
        for _ in range(WARM_UP):
            _round(calls, clock)
        rounds = list(_rounds(calls, clock, clock() + seconds, fewest, most))
    return [list(times) for times in zip(*rounds, strict=True)]


def _rounds(
    calls: Sequence[tuple[Call, Tensor]], clock: Callable[[], float], end: float, fewest: int, most: int
) -> Iterator[list[float]]:
    for number in range(most):
        if number >= fewest and clock() > end:
            return
        yield _round(calls[::-1], clock)[::-1] if number % 2 else _round(calls, clock)


def _round(calls: Sequence[tuple[Call, Tensor]], clock: Callable[[], float]) -> list[float]:
    return [_milliseconds(call, images, clock) for call, images in calls]


def _milliseconds(call: Call, images: Tensor, clock: Callable[[], float]) -> float:
    _wait_for(images.device)
    start = clock()
    call(images)
    _wait_for(images.device)
    return 1000 * (clock() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timings_of(times: Sequence[Sequence[float]], batch: int, runtimes: Sequence[str], threads: int) -> list[Timing]:
    """The figures of networks from their times in the same rounds; of all but the first with the ratio to the first."""
    found = []
    for number, (own, runtime) in enumerate(zip(times, runtimes, strict=True)):
        ratios = [mine / first for mine, first in zip(own, times[0], strict=True)]
        low, high = median_interval(ratios)
        timing = Timing(
            batch=batch,
            runtime=runtime,
            threads=threads,
            rounds=len(own),
            p50_ms=median(own),
            p90_ms=quantiles(own, n=10, method="inclusive")[-1],
            **({"ratio": median(ratios), "ratio_low": low, "ratio_high": high} if number else {}),
        )
        found.append(timing)
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of `values` their median lies with 95 % certainty or more, whatever they are drawn from.

    The k-th value from either end, with the largest k that fewer than k of n signs fall short of with a probability
    of at most 2.5 %; of fewer than six values the whole range, which is less certain.
    """
    ranked = sorted(values)
    below = accumulate(comb(len(ranked), k) / 2 ** len(ranked) for k in range(len(ranked)))
    rank = max(1, sum(probability <= TAIL for probability in below))
    return ranked[rank - 1], ranked[-rank]
