"""Kernel complexity of features: spectrum, KC, truncated nuclear norm and its frozen basis.

Letters: n images, d features of one image, r rank; F (n, d) features, K = F F^T their gram, C = F^T F / n.
K / n and C have the same non-zero eigenvalues, so the n x n gram is never made.
Source: Wang and Yang, arXiv 2507.12780; the bound is that of Bartlett, Bousquet and Mendelson (2005).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kcrprune.method.sums import Sums


@dataclass
class Covariance(Sums):
    """C, streamed in float64 where the features are: O(n d^2) work and O(d^2) memory at any n."""

    total: Tensor  # F^T F (d, d)
    images: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Self:
        """That of no image."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device))

    def add_(self, features: Tensor) -> Self:
        """Takes in features (batch, d)."""
        batch = features.detach().double()
        self.total += batch.T @ batch
        self.images += len(batch)
        return self

    def taken(self, features: Sequence[int]) -> Self:
        """That of features in another order."""
        index = torch.tensor(features, device=self.total.device)
        return type(self)(self.total[index][:, index], self.images)

    @property
    def finite(self) -> bool:
        """Whether every feature so far was a finite number."""
        return bool(self.total.isfinite().all())

    @property
    def matrix(self) -> Tensor:
        """C (d, d)."""
        return self.total / max(1, self.images)

    def spectrum(self) -> Tensor:
        """The min(n, d) leading eigenvalues of K / n, descending, non-negative."""
        return self._leading(torch.linalg.eigvalsh(self.matrix))

    def basis(self, rank: int) -> Tensor:
        """The r leading eigenvectors of C, (d, r)."""
        return self.spectrum_and_basis(rank)[1]

    def spectrum_and_basis(self, rank: int) -> tuple[Tensor, Tensor]:
        """Both, from one decomposition."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return self._leading(values), vectors[:, -rank:].flip(1)

    def _leading(self, ascending: Tensor) -> Tensor:
        return ascending.flip(0).clamp_min(0)[: min(self.images, len(ascending))]


@dataclass(frozen=True)
class KernelComplexity:
    """KC of a spectrum with everything that a report shows.

    KC is not scale-free: it falls when a network merely shrinks its features. `kc_normalised` is the KC of the
    spectrum divided by its trace.
    """

    kc: float
    h: int  # where the minimum lies
    kc_normalised: float
    trace: float
    effective_rank: float  # exp of the entropy of the normalised spectrum (Roy and Vetterli, 2007)
    images: int


def kernel_complexity(spectrum: Tensor, images: int) -> KernelComplexity:
    """KC = min over h in 0..n of h / n + sqrt(sum of the eigenvalues beyond h, divided by n).

    `spectrum` is descending and holds the eigenvalues of K / n that are not zero for sure.
    """
    spectrum = spectrum.cpu()  # at once: what follows reads it number by number
    trace = float(spectrum.sum())
    shares = spectrum / trace if trace > 0 else spectrum
    kc, h = _smallest_bound(spectrum, images)
    normalised, _ = _smallest_bound(shares, images)
    entropy = float(-(shares * shares.clamp_min(1e-300).log()).sum())
    return KernelComplexity(kc, h, normalised, trace, float(torch.tensor(entropy).exp()), images)


def _smallest_bound(spectrum: Tensor, images: int) -> tuple[float, int]:
    h = torch.arange(
        len(spectrum) + 1, dtype=torch.float64, device=spectrum.device
    )  # beyond the spectrum the bound only grows
    bounds = h / images + (tails(spectrum) / images).sqrt()
    smallest = int(bounds.argmin())
    return float(bounds[smallest]), smallest


def tails(spectrum: Tensor) -> Tensor:
    """TNN_r for r = 0..len(spectrum): the sum of the eigenvalues beyond the r largest."""
    total = spectrum.flip(0).cumsum(0).flip(0)
    return torch.cat([total, total.new_zeros(1)]).clamp_min(0)


def rank_for(share: float, images: int, features: int) -> int:
    """Rank r = max(1, floor(share * min(n, d)))."""
    return max(1, int(share * min(images, features)))


def separable_tnn(features: Tensor, basis: Tensor) -> Tensor:
    """Mean over images of ||f - V V^T f||^2 for features (batch, d) and an orthonormal basis V (d, r).

    Equal to TNN_r of the data when V is current, never below it when V is stale (Ky Fan), and unbiased in a batch of
    any size. Differentiable in the features.
    """
    inside = features @ basis.to(features)  # (batch, r)
    return (features.square().sum(1) - inside.square().sum(1)).mean()


def relative_tnn(features: Tensor, basis: Tensor) -> Tensor:
    """TNN_r over the trace, so that shrinking the features gains nothing; in [0, 1]."""
    return separable_tnn(features, basis) / features.square().sum(1).mean().clamp_min(1e-12)
