"""Position tables of networks whose images or windows have two sides, brought from one size to another.

The conversion of timm takes each for a square where it can.
"""

from math import prod
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

BIAS = ".relative_position_bias_table"


def positions(tensors: dict[str, Tensor], model: Any, own: Any) -> dict[str, Tensor]:
    """The table (1, prefix + rows * columns, D) of a file for `model`, from `own`; not where both are squares."""
    new, old = (_grid(network) for network in (model, own))
    if "pos_embed" not in tensors or max(len(set(new)), len(set(old))) < 2:
        return {}
    table = tensors["pos_embed"][:, 1 if "register_tokens" in tensors else 0 :]  # as timm's conversion of DINOv2 does
    if new != old:
        table = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=table.shape[1] - prod(old))
    return {"pos_embed": table}


def _grid(network: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(network, "patch_embed", None), "grid_size", None) or ())


def biases(tensors: dict[str, Tensor], model: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """The tables ((2 rows - 1) * (2 columns - 1), heads) of a file for `model`, from `own`; none for squares."""
    found: dict[str, Tensor] = {}
    for name in tensors:
        if not name.endswith(BIAS):
            continue
        new, old = (network.get_submodule(name.removesuffix(BIAS)) for network in (model, own))
        windows: Any = getattr(new, "window_size", (1, 1)), getattr(old, "window_size", (1, 1))
        if any(rows != columns for rows, columns in windows):
            shape = new.get_parameter(BIAS[1:]).shape
            found[name] = resize_rel_pos_bias_table(tensors[name], windows[0], tuple(shape), old_window_size=windows[1])
    return found
