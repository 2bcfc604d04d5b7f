"""How near features are, against plain loops."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kcrprune.errors import DataError
from kcrprune.training import embeddings
from kcrprune.training.evaluate import Evaluation, evaluate

FEATURES = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)) + 0.5
OTHERS = FEATURES + 0.7 * torch.randn(23, 6, generator=torch.Generator().manual_seed(1))


def evaluated(size: int, features: torch.Tensor = FEATURES, others: torch.Tensor = OTHERS) -> Evaluation:
    """The images are both networks' features side by side; no image has a label."""
    width = features[0].numel()
    images = torch.cat([features.flatten(1), others.flatten(1)], dim=1)
    loader = DataLoader(TensorDataset(images, torch.full((len(images),), -1)), batch_size=size)
    shape = features.shape[1:]
    return evaluate(
        lambda x: x[:, :width].unflatten(1, shape),
        loader,
        outputs="features",
        reference=lambda x: x[:, width:].unflatten(1, shape),
    )


def nearest(features: torch.Tensor) -> list[int]:
    rows = [row.flatten() for row in features]
    cosine = torch.nn.functional.cosine_similarity
    return [
        max((j for j in range(len(rows)) if j != i), key=lambda j: float(cosine(rows[i], rows[j], dim=0)))
        for i in range(len(rows))
    ]


@pytest.mark.parametrize("shape", [(6,), (3, 2)], ids=["vectors", "maps"])
def test_figures_equal_those_of_plain_loops(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embeddings, "ROWS", 5)
    found = evaluated(7, FEATURES.unflatten(1, shape), OTHERS.unflatten(1, shape))
    pairs = list(zip(FEATURES.double(), OTHERS.double(), strict=True))
    distance = sum(float((y - y0) @ (y - y0) / (y0 @ y0)) for y, y0 in pairs) / 23
    cosine = sum(float(y @ y0 / (y.norm() * y0.norm())) for y, y0 in pairs) / 23
    same = sum(a == b for a, b in zip(nearest(FEATURES), nearest(OTHERS), strict=True)) / 23
    assert (found.images, found.top1, found.agreement) == (23, None, None)
    assert found.distance == pytest.approx(distance, rel=1e-5)
    assert found.cosine == pytest.approx(cosine, rel=1e-5)
    assert found.retrieval == pytest.approx(same)
    assert 0 < same < 1


def test_figures_do_not_depend_on_the_batch_size():
    whole, parts = evaluated(23), evaluated(1)
    assert (parts.distance, parts.cosine) == (pytest.approx(whole.distance), pytest.approx(whole.cosine))
    assert parts.retrieval == whole.retrieval


def test_equal_features_are_at_no_distance_and_one_image_has_no_neighbour():
    found = evaluated(1, FEATURES[:1], FEATURES[:1])
    assert (found.distance, found.cosine, found.retrieval) == (0, pytest.approx(1), None)


def test_features_of_another_width_are_refused():
    loader = DataLoader(TensorDataset(FEATURES, torch.full((23,), -1)), batch_size=4)
    with pytest.raises(DataError, match=r"shape \(6,\) and the reference's \(5,\)"):
        evaluate(lambda x: x, loader, outputs="features", reference=lambda x: x[:, :5])
