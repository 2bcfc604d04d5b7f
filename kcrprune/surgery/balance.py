"""Rotates the channels inside each head to a balanced basis; the function of the network is unchanged.

Inside a head q.k and proj v are bilinear: q' = R q with k' = R^-T k, and v' = R v with proj' = proj R^-1, compute the
same for every invertible R. The balanced R makes both factors' second moments equal and diagonal, sorted, so that the
last channels are the cheapest to cut (balanced truncation: Moore, 1981). Cosine attention allows rotations alone: there
R diagonalises the sum of both moments, each over its trace.

Letters: h heads, d channels of a head, X and Y the (d, d) second moments of the two factors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kcrprune.families import Group, Key, Slot, owner_of
from kcrprune.families.linears import matrix
from kcrprune.families.observed import See, watching
from kcrprune.measure.algebra import ALGEBRA
from kcrprune.method.sums import Sums
from kcrprune.surgery.swap import linear_at

RIDGE = 1e-7  # share of the mean second moment that keeps the Cholesky factors of unused channels invertible


@dataclass
class HeadMoments(Sums):
    """Sums over tokens of the second moments of a group's heads, each (h, d, d).

    Of q and k, or of what attention hands to the reader (and nothing).
    """

    first: Tensor
    second: Tensor


@torch.no_grad()
def balance_(model: nn.Module, groups: Iterable[Group], batches: Iterable[Tensor]) -> nn.Module:
    """Rotates the heads of every group that allows it, on the statistics of `batches` of images.

    The output moves by rounding only (1e-5 relative in float32).
    """
    turned = [group for group in groups if rotates(group)]
    moments = head_moments(model, turned, batches)
    with ALGEBRA.running():
        for group in turned:
            _rotate_(model, group, moments[group.key])
    return model


def _rotate_(model: nn.Module, group: Group, found: HeadMoments) -> None:
    if group.readers:
        _rotate_value_(model, group, found.first)
    elif group.basis == "orthogonal":
        rotation = diagonalising(found.first, found.second)
        for slot in group.writers:
            _rotate_rows_(model, group, slot, rotation)
    else:
        rotation, inverse = balancing(found.first, found.second)
        for half, turn in zip(halves(group), (rotation, inverse.transpose(1, 2)), strict=True):
            for slot in half:
                _rotate_rows_(model, group, slot, turn)


def rotates(group: Group) -> bool:
    """Whether a change of basis inside the heads of a group leaves the network unchanged."""
    return group.axis in ("attn_query", "attn_value") and group.basis != "fixed"


def halves(group: Group) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """The writers of q and those of k of a group without readers."""
    middle = len(group.writers) // 2
    return group.writers[:middle], group.writers[middle:]


def head_moments(model: nn.Module, groups: Sequence[Group], batches: Iterable[Tensor]) -> dict[Key, HeadMoments]:
    """Second moments of q and k, or of what enters the reader, for each head of each group.

    k is centred over the keys of its window: softmax ignores what all keys have in common. Under cosine attention both
    have length 1.
    """
    device = next(model.parameters()).device
    moments: dict[Key, HeadMoments] = {}
    seen: dict[str, list[See]] = {}
    for group in groups:
        zeros = torch.zeros(2, group.heads, group.width, group.width, dtype=torch.float64, device=device)
        moments[group.key] = found = HeadMoments(zeros[0], zeros[1])
        if group.readers:
            seen.setdefault(group.readers[0].owner, []).append(_see_reader(group, found))
        else:
            for place, half in enumerate(halves(group)):
                see = _see_writer(group, half[0], (found.first, found.second)[place], is_key=place == 1)
                seen.setdefault(half[0].owner, []).append(see)
    with _all_watched(model, seen):
        for images in batches:
            model(images.to(device, non_blocking=True))
    for found in moments.values():
        found.sum_over_processes_()
    return moments


@contextmanager
def _all_watched(model: nn.Module, seen: Mapping[str, Sequence[See]]) -> Iterator[None]:
    def each(sees: Sequence[See]) -> See:
        def see_all(inputs: Tensor, output: Tensor) -> None:
            for see in sees:
                see(inputs, output)

        return see_all

    with watching(model, {name: each(sees) for name, sees in seen.items()}):
        yield


def _see_reader(group: Group, moments: HeadMoments) -> See:
    def see(inputs: Tensor, output: Tensor) -> None:
        moments.first += _second_moment(inputs.unflatten(-1, (group.heads, group.width)))

    return see


def _see_writer(group: Group, slot: Slot, total: Tensor, *, is_key: bool) -> See:
    places = slot.among(group.heads, group.width)

    def see(inputs: Tensor, output: Tensor) -> None:
        x = output[..., places]
        x = x.unflatten(-1, (group.heads, group.width))  # (windows, T, h, d)
        if group.basis == "orthogonal":
            x = nn.functional.normalize(x, dim=-1)
        elif is_key:
            x = x - x.mean(-3, keepdim=True)
        total.add_(_second_moment(x))

    return see


def _second_moment(x: Tensor) -> Tensor:
    """Sum of x x^T over windows and tokens, (h, d, d), of x (..., h, d)."""
    flat = x.flatten(0, -3).transpose(0, 1).double()  # (h, tokens, d)
    return flat.transpose(1, 2) @ flat


def balancing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """R and R^-1 (h, d, d) such that R X R^T = R^-T Y R^-1 = diag(S), S descending.

    With X = Lx Lx^T, Y = Ly Ly^T and Ly^T Lx = U S V^T: R = S^-1/2 U^T Ly^T and R^-1 = Lx V S^-1/2.
    """
    lx, ly = _factor(x), _factor(y)
    u, s, vt = torch.linalg.svd(ly.transpose(1, 2) @ lx)
    root = s.clamp_min(s[:, :1] * 1e-12).rsqrt()
    rotation = root.unsqueeze(2) * (u.transpose(1, 2) @ ly.transpose(1, 2))
    inverse = (lx @ vt.transpose(1, 2)) * root.unsqueeze(1)
    return rotation, inverse


def diagonalising(x: Tensor, y: Tensor) -> Tensor:
    """The rotation R (h, d, d) that makes the sum of both moments, each over its trace, diagonal and descending."""
    shares = [moment / moment.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None] for moment in (x, y)]
    return torch.linalg.eigh(shares[0] + shares[1]).eigenvectors.flip(2).transpose(1, 2)


def _factor(moment: Tensor) -> Tensor:
    """The Cholesky factor of a second moment (h, d, d), made safely positive."""
    size = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # (h,)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment + (RIDGE * size)[:, None, None] * eye)


def _rotate_value_(model: nn.Module, group: Group, moment: Tensor) -> None:
    reader = matrix(linear_at(model, group.readers[0].owner))
    columns = reader.double().unflatten(1, (group.heads, group.width)).transpose(0, 1)  # (h, D, d)
    scaled = columns if group.scale is None else columns * scale_of(model, group.scale).double()[None, :, None]
    rotation, inverse = balancing(moment, scaled.transpose(1, 2) @ scaled)
    for slot in group.writers:
        _rotate_rows_(model, group, slot, rotation)
    reader.copy_((columns @ inverse).transpose(0, 1).flatten(1))


def scale_of(model: nn.Module, name: str) -> Tensor:
    """The factors (D,) of a LayerScale: a module's gamma, or a bare parameter; of one over images it is (D, 1, 1)."""
    owner = owner_of(model, name)
    gamma = owner if isinstance(owner, Tensor) else owner.gamma
    assert isinstance(gamma, Tensor), name
    return gamma.flatten()


def _rotate_rows_(model: nn.Module, group: Group, slot: Slot, rotation: Tensor) -> None:
    """Multiplies the rows that a slot names, of a weight and its bias or of a bare bias, by `rotation` (h, d, d)."""
    owner = owner_of(model, slot.owner)
    tensors = [owner] if isinstance(owner, Tensor) else [owner.weight, owner.bias]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            places = slot.among(group.heads, group.width)
            rows = tensor[places]
            turned = rotation @ rows.reshape(group.heads, group.width, -1).double()  # (h, d, D or 1)
            tensor[places] = turned.to(tensor).view_as(rows)
