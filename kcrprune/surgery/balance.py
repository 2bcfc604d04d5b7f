"""Rotates the channels inside each head to a balanced basis; the function of the network is unchanged.

Inside a head q.k and proj v are bilinear: q' = R q with k' = R^-T k, and v' = R v with proj' = proj R^-1, compute the
same for every invertible R. The balanced R makes both factors' second moments equal and diagonal, sorted, so that the
last channels are the cheapest to cut (balanced truncation: Moore, 1981).

Letters: h heads, d channels of a head, X and Y the (d, d) second moments of the two factors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite
from kcrprune.surgery.swap import layer_scale_at, linear_at

RIDGE = 1e-7  # share of the mean second moment that keeps the Cholesky factors of unused channels invertible


@dataclass
class HeadMoments:
    """Sums over tokens of the second moments of one block's heads, each (h, d, d)."""

    query: Tensor
    key: Tensor
    output: Tensor  # what attention hands to proj


@torch.no_grad()
def balance_(model: nn.Module, sites: Iterable[BlockSite], batches: Iterable[Tensor]) -> nn.Module:
    """Rotates q, k, v and proj of every block that allows it, on the statistics of `batches` of images.

    The output moves by rounding only (1e-5 relative in float32).
    """
    sites = [site for site in sites if site.rotate_query or site.rotate_value]
    moments = head_moments(model, sites, batches)
    for site in sites:
        if site.rotate_query:
            _rotate_query_(model, site, moments[site.name])
        if site.rotate_value:
            _rotate_value_(model, site, moments[site.name])
    return model


def head_moments(model: nn.Module, sites: Iterable[BlockSite], batches: Iterable[Tensor]) -> dict[str, HeadMoments]:
    """Second moments of q, of k and of what enters proj, for each head of each site.

    k is centred over the keys of its window: softmax ignores what all keys have in common.
    """
    moments, hooks = {}, []
    for site in sites:
        zeros = torch.zeros(3, site.heads, site.head_dim, site.head_dim, dtype=torch.float64)
        moments[site.name] = HeadMoments(*zeros)
        hooks += [
            model.get_submodule(site.qkv).register_forward_hook(partial(_see_qkv, site, moments[site.name])),
            model.get_submodule(site.proj).register_forward_pre_hook(partial(_see_output, site, moments[site.name])),
        ]
    device = next(model.parameters()).device
    try:
        for images in batches:
            model(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _see_qkv(site: BlockSite, moments: HeadMoments, module: nn.Module, inputs: tuple[Tensor], qkv: Tensor) -> None:
    q, k, _ = qkv.unflatten(-1, (3, site.heads, site.head_dim)).unbind(-3)  # (windows, T, h, d)
    moments.query += _second_moment(q)
    moments.key += _second_moment(k - k.mean(1, keepdim=True))


def _see_output(site: BlockSite, moments: HeadMoments, module: nn.Module, inputs: tuple[Tensor]) -> None:
    moments.output += _second_moment(inputs[0].unflatten(-1, (site.heads, site.head_dim)))


def _second_moment(x: Tensor) -> Tensor:
    """Sum of x x^T over windows and tokens, (h, d, d), of x (windows, T, h, d)."""
    flat = x.flatten(0, 1).transpose(0, 1).double()  # (h, tokens, d)
    return (flat.transpose(1, 2) @ flat).cpu()


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


def _factor(moment: Tensor) -> Tensor:
    """The Cholesky factor of a second moment (h, d, d), made safely positive."""
    size = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # (h,)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype)
    return torch.linalg.cholesky(moment + (RIDGE * size)[:, None, None] * eye)


def _rotate_query_(model: nn.Module, site: BlockSite, moments: HeadMoments) -> None:
    rotation, inverse = balancing(moments.query, moments.key)
    _rotate_rows_(model, site, 0, rotation)
    _rotate_rows_(model, site, 1, inverse.transpose(1, 2))


def _rotate_value_(model: nn.Module, site: BlockSite, moments: HeadMoments) -> None:
    proj = linear_at(model, site.proj).weight
    columns = proj.double().cpu().unflatten(1, (site.heads, site.head_dim)).transpose(0, 1)  # (h, D, d)
    scaled = columns
    if site.scale1 is not None:
        gamma = layer_scale_at(model, f"{site.name}.{site.scale1}")
        scaled = columns * gamma.double().cpu()[None, :, None]
    rotation, inverse = balancing(moments.output, scaled.transpose(1, 2) @ scaled)
    _rotate_rows_(model, site, 2, rotation)
    proj.copy_((columns @ inverse).transpose(0, 1).flatten(1))


def _rotate_rows_(model: nn.Module, site: BlockSite, part: int, rotation: Tensor) -> None:
    """Multiplies the rows of q (0), k (1) or v (2) of each head, and their biases, by `rotation` (h, d, d)."""
    qkv = linear_at(model, site.qkv)
    for tensor in (qkv.weight, qkv.bias):
        if tensor is not None:
            rows = tensor.view(3, site.heads, site.head_dim, -1)[part]  # (h, d, D or 1), a view
            rows.copy_(rotation @ rows.double().cpu())
