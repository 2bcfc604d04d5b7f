import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kcrprune.training.images.generated import GeneratedImages, one_over_f, paint_


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 9), height=st.integers(2, 40), width=st.integers(2, 40))
def test_an_image_depends_on_seed_index_and_size_alone(seed, index, height, width):
    alone = GeneratedImages(10, (height, width), seed)[index]
    among_others = GeneratedImages(1000, (height, width), seed)
    for other in (3, 7):
        among_others[other]
    assert torch.equal(alone, among_others[index])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 70), width=st.integers(1, 70))
def test_images_have_the_size_and_the_range_that_they_promise(seed, height, width):
    image = GeneratedImages(1, (height, width), seed)[0]
    assert image.shape == (3, height, width)
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1


def test_images_differ_by_index_and_by_seed():
    images = [GeneratedImages(2, (24, 24), seed)[index] for seed in (0, 1) for index in (0, 1)]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert all((images[a] - images[b]).abs().mean() > 0.02 for a, b in pairs)


def test_iterating_ends_after_the_last_image():
    images: Any = GeneratedImages(3, (8, 8), 0)
    assert len(list(images)) == 3


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="image 3 of 3"):
        GeneratedImages(3, (8, 8), 0)[3]


@pytest.mark.parametrize("exponent", [0.8, 1.5])
def test_the_noise_has_the_spectrum_that_was_asked_for(exponent):
    noise = np.mean([power(one_over_f(np.random.default_rng(seed), (64, 64), exponent)) for seed in range(20)], axis=0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64))
    used = (frequency >= 2) & (frequency < 30)
    slope = np.polyfit(np.log(frequency[used]), np.log(noise[used]), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.1)  # power is the square of the amplitude


def test_generated_images_have_a_spectrum_like_photographs():
    dataset = GeneratedImages(60, (64, 64), 0)
    images = torch.stack([dataset[index] for index in range(60)]).numpy()
    noise = np.mean([power(image - image.mean(axis=(1, 2), keepdims=True)) for image in images], axis=0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64))
    used = (frequency >= 2) & (frequency < 30)
    slope = np.polyfit(np.log(frequency[used]), np.log(noise[used]), 1)[0]
    assert -3 < slope < -1.5  # photographs: about -2 (Field 1987)


def test_a_painted_shape_changes_its_surroundings_only():
    random = np.random.default_rng(3)
    image = np.full((3, 200, 200), 0.5, dtype=np.float32)
    paint_(image, np.zeros_like(image), 10.0, np.full(3, 3.0, dtype=np.float32), random)
    rows, columns = np.nonzero((image != 0.5).any(axis=0))
    assert len(rows) > 20
    assert np.ptp(rows) < 60
    assert np.ptp(columns) < 60


def power(image):
    return (np.abs(np.fft.fft2(image)) ** 2).mean(axis=0)


def test_images_that_are_kept_are_made_once_by_whichever_process_asks_and_are_the_same(tmp_path, monkeypatch):
    kept = GeneratedImages(4, (8, 8), 0, tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    first = [image for batch in DataLoader(kept, batch_size=2, num_workers=1) for image in batch]
    monkeypatch.setattr(GeneratedImages, "_generated", lambda *_: pytest.fail("made twice"))
    assert all(torch.equal(kept[index], image) for index, image in enumerate(first))
    monkeypatch.undo()
    assert all(torch.equal(GeneratedImages(4, (8, 8), 0)[index], image) for index, image in enumerate(first))


def test_images_without_room_on_the_disk_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    assert torch.equal(GeneratedImages(2, (8, 8), 0, tmp_path)[1], GeneratedImages(2, (8, 8), 0)[1])
