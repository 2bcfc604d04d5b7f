"""Token merging (ToMe, 2210.09461) on plain ViTs, as a method of peers.py: fewer tokens in place of fewer channels.

Letters: B images, N tokens, D channels of the stream, r tokens that a block merges away.
"""

import copy
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import torch
import torch.nn.functional as F
from peer_methods import Method, NotReachedError, Pruned, Task
from timm.models.vision_transformer import Block
from torch import Tensor, nn


@dataclass
class Sizes:
    """How many of the first tokens each token stands for (B, N, 1); None before the first block."""

    tokens: Tensor | None = None


class MergingBlock(nn.Module):
    """A block that merges its r most similar tokens between attention and MLP; keys tell how similar they are."""

    def __init__(self, block: Any, fewer: int, prefix: int, sizes: Sizes, *, first: bool) -> None:
        super().__init__()
        self.block, self.fewer, self.prefix, self.sizes, self.first = block, fewer, prefix, sizes, first
        self.keys = torch.empty(0)
        block.attn.qkv.register_forward_hook(self._see)

    def _see(self, linear: nn.Module, inputs: Any, output: Tensor) -> None:
        heads = self.block.attn.num_heads
        self.keys = output.unflatten(-1, (3, heads, -1))[:, :, 1].mean(2)  # (B, N, d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N - r, D); a token that stands for several weighs as much in attention."""
        if self.first or self.sizes.tokens is None:
            self.sizes.tokens = torch.ones_like(x[..., :1])
        block, size = self.block, self.sizes.tokens
        weights = size.log().transpose(1, 2).unsqueeze(1)  # (B, 1, 1, N)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=weights)))
        if self.fewer:
            x, self.sizes.tokens = merged(x, size, self.keys, self.fewer, self.prefix)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def merged(x: Tensor, size: Tensor, keys: Tensor, fewer: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N - r, D) and their sizes: every second token may join the one of the others that is most like it.

    The first `prefix` tokens neither join nor are joined.
    """
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (B, of those that may go, of those that stay)
    kept = torch.zeros_like(scores)
    kept[:, : (prefix + 1) // 2] = -torch.inf
    kept[:, :, : prefix // 2] = -torch.inf
    best, to = (scores + kept).max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, stay = order[:, :fewer], order[:, fewer:].sort(dim=-1).values
    both = torch.cat([x * size, size], dim=-1)  # (B, N, D + 1)
    first, second = both[:, ::2], both[:, 1::2]

    def rows(places: Tensor) -> Tensor:
        return places.unsqueeze(-1).expand(-1, -1, both.shape[-1])

    joined = second.scatter_add(1, rows(to.gather(1, gone)), first.gather(1, rows(gone)))
    left = first.gather(1, rows(stay))
    front, back = (prefix + 1) // 2, prefix // 2  # the prefix keeps its places
    found = torch.cat([left[:, :front], joined[:, :back], left[:, front:], joined[:, back:]], dim=1)
    return found[..., :-1] / found[..., -1:], found[..., -1:]


def merging(model: Any, total: int) -> nn.Module:
    """A copy whose blocks merge `total` tokens away, all of them as many, the first ones one more."""
    model = copy.deepcopy(model)
    count, sizes = len(model.blocks), Sizes()
    shares = [total // count + (number < total % count) for number in range(count)]
    model.blocks = nn.Sequential(
        *(
            MergingBlock(block, fewer, model.num_prefix_tokens, sizes, first=number == 0)
            for number, (block, fewer) in enumerate(zip(model.blocks, shares, strict=True))
        )
    )
    return model.eval()


def tome(task: Task) -> Pruned:
    """The network that merges just enough tokens for the target, with the weights as they are."""
    start, dense = perf_counter(), task.run.network.dense
    blocks = getattr(dense, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or any(type(block) is not Block for block in blocks):
        raise NotReachedError("tokens merge on plain ViTs alone")
    tokens = dense.patch_embed.num_patches  # type: ignore[union-attr]
    low, high, best = 0, tokens - 1, None
    while low < high:  # the least that meets the target
        total = (low + high) // 2
        try:
            model = merging(dense, total)
            fits = task.macs(model) <= task.limit
        except (IndexError, RuntimeError):  # more than half of a block's tokens
            fits = True
            model = None
        low, high, best = (low, total, model) if fits else (total + 1, high, best)
    if best is None:
        raise NotReachedError("merging as many tokens as can be leaves more MACs")
    return Pruned(best, perf_counter() - start)


METHODS: Final[dict[str, Method]] = {"tome": tome}
