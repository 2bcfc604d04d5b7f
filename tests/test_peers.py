"""The peers' formulas, each by a second route: least squares on stacked rows, all pairs of tokens, equal tokens."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kcrprune.artifact.artifact import open_model

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
STAY, GONE = [0, 2, 3], [1, 4]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("peer_closed_form", "peer_methods", "peer_tokens"):
        sys.modules.pop(name, None)


def rows(seed, count=40, width=5):
    """Correlated rows (count, width) with a mean."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mix + 1.5


def ridge_by_rows(read, wanted, ridge):
    """(inputs, outputs) least squares with the ridge as further rows of data."""
    penalty = np.sqrt(ridge * len(read)) * np.eye(read.shape[1])
    stacked = np.vstack([read, penalty]), np.vstack([wanted, np.zeros((read.shape[1], wanted.shape[1]))])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


def moments(data):
    from peer_closed_form import Moments  # type: ignore[import-not-found]

    found = Moments.empty(data.shape[1])
    for part in data.split(15):
        found.see(part, part)
    return found


def test_grail_is_ridge_regression_of_all_inputs_on_those_that_stay():
    from peer_closed_form import RIDGE, reconstructed  # type: ignore[import-not-found]

    data, weight = rows(0), rows(1, count=3)
    read = data[:, STAY].numpy()
    ridge = RIDGE * float((data[:, STAY] ** 2).mean())
    wide = ridge_by_rows(read, data.numpy(), ridge)  # (S, I)
    found = reconstructed(weight, moments(data).energy, STAY)
    np.testing.assert_allclose(found, weight.numpy() @ wide.T, rtol=1e-8, atol=1e-10)


def test_corp_is_ridge_regression_with_a_free_mean_and_vbp_the_mean_alone():
    from peer_closed_form import RIDGE, compensated  # type: ignore[import-not-found]

    data, weight = rows(2), rows(3, count=3)
    centred = (data - data.mean(0)).numpy()
    ridge = RIDGE * float((centred[:, STAY] ** 2).mean())
    made = ridge_by_rows(centred[:, STAY], centred[:, GONE], ridge)  # (S, P)
    found, shift = compensated(weight, moments(data), STAY, linear=True)
    np.testing.assert_allclose(found, weight[:, STAY].numpy() + weight[:, GONE].numpy() @ made.T, rtol=1e-8)
    for linear in (True, False):
        found, shift = compensated(weight, moments(data), STAY, linear=linear)
        answers = data[:, STAY] @ found.T + shift
        torch.testing.assert_close(answers.mean(0), (data @ weight.T).mean(0))
    assert torch.equal(found, weight[:, STAY])


def test_corps_logits_are_least_squares_over_all_pairs_of_tokens():
    from peer_closed_form import logit_map  # type: ignore[import-not-found]

    queries, keys = (torch.stack([rows(seed + image, 6) for image in range(4)]) for seed in (10, 20))  # (n, N, d)
    found = logit_map(*(torch.einsum("ntc,ntd->ncd", x, x) for x in (queries, keys)), STAY)
    read, wanted = [], []
    for q, k in zip(queries, keys, strict=True):
        for one in q:
            for other in k:
                read.append(np.outer(one[STAY], other[STAY]).ravel())
                wanted.append(float(one[GONE] @ other[GONE]))
    read, wanted = np.array(read), np.array(wanted)[:, None]
    made = ridge_by_rows(read, wanted, 1e-3 * float((read**2).mean()))
    np.testing.assert_allclose(found.numpy().ravel(), made.ravel(), rtol=1e-6, atol=1e-9)


@pytest.fixture
def deit():
    """The distilled deit of the benchmarks, whose first two tokens are no patches, on one image of one colour."""
    model = open_model(FOLDER / "weights" / "deit_cifar10.safetensors").model.eval()
    places = model.get_parameter("pos_embed").data
    places[:, 2:] = places[:, 2:3]  # so that all patches are one token, many times
    return model, torch.full((2, 3, 32, 32), 0.3)


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing_and_fewer_are_left(deit):
    from peer_tokens import merging  # type: ignore[import-not-found]

    model, images = deit
    expected = model(images)
    for total in (0, 7, 40):
        fewer = merging(model, total)
        torch.testing.assert_close(fewer(images), expected, rtol=1e-4, atol=1e-4)
        left = fewer.forward_features(images)  # pyright: ignore
        left = left[0] if isinstance(left, tuple) else left
        assert left.shape[1] == model.forward_features(images).shape[1] - total


def test_the_most_alike_merge_by_their_sizes_and_the_prefix_stays():
    from peer_tokens import merged  # type: ignore[import-not-found]

    keys = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 0.5]]).unsqueeze(0).float()
    x, size = torch.arange(6.0).view(1, 6, 1), torch.tensor([1, 1, 1, 3, 2, 1]).view(1, 6, 1).float()
    tokens, sizes = merged(x, size, keys, 1, 2)  # 0 and 1 are the prefix; 4 is like 3, and 2 only somewhat like 5
    assert tokens.flatten().tolist() == pytest.approx([0, 1, 2, (4 * 2 + 3 * 3) / 5, 5])
    assert sizes.flatten().tolist() == [1, 1, 1, 5, 1]
