import time

import pytest
import torch

from kcrprune.measure.latency import latency_ms

IMAGES = torch.zeros(1, 3, 4, 4)


def test_every_call_gets_the_images_and_runs_without_gradients():
    seen = []

    def call(images):
        seen.append((images, torch.is_inference_mode_enabled()))

    latency_ms(call, IMAGES, warmup=3, runs=5)
    assert len(seen) == 8
    assert all(images is IMAGES and inference for images, inference in seen)


def test_it_is_the_median_in_milliseconds(monkeypatch):
    ticks = iter([0.0, 0.004, 1.0, 1.010, 2.0, 7.0])  # seconds: calls of 4, 10 and 5000 ms
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert latency_ms(lambda images: None, IMAGES, warmup=0, runs=3) == pytest.approx(10)


def test_warm_up_is_not_timed():
    pauses = iter([0.2, 0.0, 0.0, 0.0])
    assert latency_ms(lambda images: time.sleep(next(pauses)), IMAGES, warmup=1, runs=3) < 100


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

    measured = latency_ms(call, images, warmup=3, runs=5)
    assert measured >= 0.9 * start.elapsed_time(end)
