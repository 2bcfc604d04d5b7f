"""What a module inside a model sees of an input: partial forward passes, and the order of attention's tokens."""

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite


class _ReachedError(Exception):
    """Ends a forward pass at the module whose input was wanted."""


def input_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the module `name` receives when `model` runs on x; the rest of the pass is skipped."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _ReachedError

    hook = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        model(x)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return seen[0]


def as_attention_sees(block: nn.Module, site: BlockSite, stream: Tensor) -> Tensor:
    """A stream in the order of attention's tokens (windowed, shifted, padded with zeros), without the norm before."""
    hook = block.get_submodule(site.norm1).register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        return input_of(block, site.attn, stream)
    finally:
        hook.remove()


def real_tokens(block: nn.Module, site: BlockSite, stream: Tensor) -> Tensor:
    """Which of attention's tokens, flattened over images and windows, are the stream's own and no window padding."""
    return as_attention_sees(block, site, torch.ones_like(stream)).flatten(0, -2)[:, 0] > 0
