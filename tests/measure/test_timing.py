from functools import partial

import pytest
import torch

from kcrprune.measure.timing import WARM_UP, in_turn, median_interval, timings_of

IMAGES = torch.zeros(1, 3, 4, 4)


def test_networks_are_called_in_turn_and_in_every_other_round_backwards():
    seen = []

    def calls(name):
        return lambda images: seen.append((name, images is IMAGES, torch.is_inference_mode_enabled())), IMAGES

    times = in_turn([calls("a"), calls("b")], seconds=0, fewest=3)
    assert [len(own) for own in times] == [3, 3]
    assert [name for name, *_ in seen] == ["a", "b"] * WARM_UP + ["a", "b", "b", "a", "a", "b"]
    assert all(whole for _, *rest in seen for whole in rest)


def test_times_are_those_of_their_own_network():
    now = [0.0]  # seconds

    def lasts(seconds):
        def call(images):
            now[0] += seconds

        return call, IMAGES

    timed = partial(in_turn, clock=lambda: now[0])
    times = timed([lasts(0.004), lasts(0.003)], seconds=0.02)
    assert times == [pytest.approx([4.0] * 7), pytest.approx([3.0] * 7)]  # the fewest, though 0.02 s are over
    assert len(timed([lasts(0.001)], seconds=0.0195)[0]) == 20
    assert len(timed([lasts(0.001)], seconds=9, most=30)[0]) == 30


def test_the_second_is_compared_with_the_first_round_by_round():
    drifting = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]  # the machine slows down
    first, second = timings_of([drifting, [0.5 * time for time in drifting]], 8, ["x", "y"], threads=2)
    assert (first.ratio, first.p50_ms, first.batch, first.rounds, first.runtime) == (None, 4.5, 8, 8, "x")
    assert first.p90_ms == pytest.approx(7.3)
    assert (second.ratio, second.ratio_low, second.ratio_high, second.runtime) == (0.5, 0.5, 0.5, "y")


@pytest.mark.parametrize(("count", "rank"), [(5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_the_interval_has_the_ranks_of_the_binomial_table(count, rank):
    """Ranks as printed for the 95 % interval of a median, from its order statistics (Conover, table A3)."""
    assert median_interval(list(range(count, 0, -1))) == (rank, count + 1 - rank)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_queued_work_on_the_device_counts():
    images = torch.zeros(4096, 4096, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call(matrix):
        start.record()
        for _ in range(20):
            matrix = matrix @ images
        end.record()
        return matrix

    (measured,) = in_turn([(call, images)], seconds=0, fewest=1)
    assert measured[0] >= 0.9 * start.elapsed_time(end)
