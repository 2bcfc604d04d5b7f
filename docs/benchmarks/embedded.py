"""What embeddings are worth: how near to other ones, and how well a class is found by them.

Letters: n images to look at, m to look among, d channels, C classes.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kcrprune.method.objective import relative_distances

NEIGHBOURS: Final = 20
PENALTY: Final = 1e-3  # of the linear probe's squared weights, on standardised embeddings


@dataclass(frozen=True)
class Embedded:
    """Embeddings (m, d) with classes (m,) to look among, and (n, d) with classes (n,) to look at."""

    among: Tensor
    classes: Tensor
    images: Tensor
    truth: Tensor


def nearness(images: Tensor, wanted: Tensor, centre: Tensor) -> dict[str, float]:
    """Means over images (n, d): relative squared distance, cosine, and both seen from `centre` (d,)."""
    near = {
        "distance": relative_distances(images, wanted),
        "cosine": F.cosine_similarity(images, wanted),
        "centred distance": relative_distances(images - centre, wanted - centre),
        "centred cosine": F.cosine_similarity(images - centre, wanted - centre),
    }
    return {name: float(values.double().mean()) for name, values in near.items()}


def answers(found: Embedded) -> dict[str, Tensor]:
    """Which images (n,) are named rightly by each way."""
    ways = {"class mean": class_mean, "neighbours": neighbours, "probe": probe}
    return {name: way(found) == found.truth for name, way in ways.items()}


def class_mean(found: Embedded) -> Tensor:
    """The class (n,) whose mean unit vector has the largest cosine."""
    units = F.normalize(found.among, dim=1)
    one = F.one_hot(found.classes).to(units.dtype)
    means = F.normalize(one.T @ units, dim=1)  # (C, d)
    return (F.normalize(found.images, dim=1) @ means.T).argmax(1)


def neighbours(found: Embedded) -> Tensor:
    """The class (n,) that most of the nearest by cosine have."""
    units, one = F.normalize(found.among, dim=1), F.one_hot(found.classes)
    count = min(NEIGHBOURS, len(units))
    chosen = [
        one[(F.normalize(part, dim=1) @ units.T).topk(count, dim=1).indices].sum(1).argmax(1)
        for part in found.images.split(1024)
    ]
    return torch.cat(chosen)


def probe(found: Embedded) -> Tensor:
    """The class (n,) by logistic regression on standardised embeddings, in float64."""
    among, images = found.among.double(), found.images.double()
    mean, spread = among.mean(0), among.std(0).clamp_min(1e-6)
    among, images = (among - mean) / spread, (images - mean) / spread
    classes = int(found.classes.max()) + 1
    weight = torch.zeros(classes, among.shape[1] + 1, dtype=torch.float64, device=among.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(among @ weight[:, :-1].T + weight[:, -1], found.classes)
        value = value + PENALTY / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return (images @ weight[:, :-1].T + weight[:, -1]).argmax(1)


def paired(own: Tensor, dense: Tensor) -> dict[str, float]:
    """Percent named rightly (n,) by both, their difference in points and its standard error."""
    points = 100 * (own.double() - dense.double())
    return {
        "dense": 100 * float(dense.double().mean()),
        "pruned": 100 * float(own.double().mean()),
        "difference": float(points.mean()),
        "error": float(points.std()) / len(points) ** 0.5,
    }
