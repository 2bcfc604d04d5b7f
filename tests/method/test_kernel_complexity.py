"""KC and TNN against the n x n gram, brute force, scipy-free numpy routes and autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcrprune.method.kernel_complexity import (
    Covariance,
    kernel_complexity,
    rank_for,
    relative_tnn,
    separable_tnn,
    tails,
)

SHAPES = st.tuples(st.integers(2, 40), st.integers(1, 24), st.integers(0, 2**16))
MANY = settings(max_examples=30, deadline=None, derandomize=True)


def draw(shape: tuple[int, int, int]) -> torch.Tensor:
    n, d, seed = shape
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale


def gram_spectrum(features: torch.Tensor) -> np.ndarray:
    """Eigenvalues of K / n by numpy, from the n x n gram that the package never makes."""
    gram = features.numpy() @ features.numpy().T / len(features)
    return np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)


@MANY
@given(shape=SHAPES)
def test_spectrum_is_that_of_the_gram(shape):
    features = draw(shape)
    expected = gram_spectrum(features)[: min(features.shape)]
    actual = Covariance.empty(features.shape[1]).add_(features).spectrum()
    assert np.allclose(actual.numpy(), expected, atol=1e-10)


@MANY
@given(shape=SHAPES)
def test_kc_is_the_smallest_bound_over_every_h(shape):
    features = draw(shape)
    n, spectrum = len(features), gram_spectrum(features)
    expected = min(h / n + np.sqrt(spectrum[h:].sum() / n) for h in range(n + 1))
    found = kernel_complexity(Covariance.empty(features.shape[1]).add_(features).spectrum(), n)
    assert found.kc == pytest.approx(expected, abs=1e-6)
    assert found.h / n + np.sqrt(spectrum[found.h :].sum() / n) == pytest.approx(expected, abs=1e-6)
    for rank in range(min(features.shape)):  # lowering TNN lowers a bound on KC
        assert found.kc <= rank / n + np.sqrt(spectrum[rank:].sum() / n) + 1e-6


@MANY
@given(shape=SHAPES)
def test_tails_run_from_the_trace_to_zero(shape):
    features = draw(shape)
    found = tails(Covariance.empty(features.shape[1]).add_(features).spectrum())
    assert float(found[0]) == pytest.approx(float(features.square().sum() / len(features)))
    assert found[-1] == 0
    assert (found.diff() <= 1e-12).all()


@MANY
@given(shape=SHAPES, parts=st.integers(1, 5))
def test_streamed_and_sharded_covariance_is_the_whole(shape, parts):
    features = draw(shape)
    whole = Covariance.empty(features.shape[1]).add_(features)
    shards = [Covariance.empty(features.shape[1]) for _ in range(parts)]
    for index, row in enumerate(features):
        shards[index % parts].add_(row[None].float().double())
    merged = Covariance.empty(features.shape[1])
    for shard in shards:
        merged.merge_(shard)
    assert merged.images == whole.images
    assert torch.allclose(merged.matrix, whole.matrix, atol=1e-6)


@MANY
@given(shape=SHAPES, share=st.floats(0.01, 1.0))
def test_separable_tnn_is_exact_at_the_current_basis_and_never_below_it(shape, share):
    features = draw(shape)
    covariance = Covariance.empty(features.shape[1]).add_(features)
    rank = min(rank_for(share, *features.shape), features.shape[1])
    exact = tails(covariance.spectrum())[min(rank, len(covariance.spectrum()))]
    assert torch.allclose(separable_tnn(features, covariance.basis(rank)), exact, atol=1e-9)
    stale = torch.linalg.qr(draw((features.shape[1], rank, shape[2] + 1))).Q
    assert separable_tnn(features, stale) >= exact - 1e-9
    assert 0 <= relative_tnn(features, stale) <= 1 + 1e-9


@MANY
@given(shape=SHAPES)
def test_gradient_at_the_current_basis_is_that_of_the_exact_tnn(shape):
    features = draw(shape)
    rank = rank_for(0.3, *features.shape)
    basis = Covariance.empty(features.shape[1]).add_(features).basis(rank)
    ours, exact = features.clone().requires_grad_(), features.clone().requires_grad_()
    separable_tnn(ours, basis).backward()
    eigenvalues = torch.linalg.eigvalsh(exact.T @ exact / len(exact))
    eigenvalues[: len(eigenvalues) - rank].sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert torch.allclose(ours.grad, exact.grad, atol=1e-7)


def test_shrinking_the_features_lowers_kc_but_not_the_normalised_figures():
    features = draw((30, 10, 0))
    big = kernel_complexity(Covariance.empty(10).add_(features).spectrum(), 30)
    small = kernel_complexity(Covariance.empty(10).add_(features / 10).spectrum(), 30)
    assert small.kc < big.kc
    assert small.kc_normalised == pytest.approx(big.kc_normalised)
    assert small.effective_rank == pytest.approx(big.effective_rank)


def test_effective_rank_of_equal_eigenvalues_is_their_number():
    assert kernel_complexity(torch.ones(7, dtype=torch.float64), 100).effective_rank == pytest.approx(7)


@pytest.mark.parametrize(("share", "images", "features", "rank"), [(0.05, 10_000, 768, 38), (0.05, 10, 5, 1)])
def test_rank(share, images, features, rank):
    assert rank_for(share, images, features) == rank
