"""Names by rules: what the converters of several layouts share."""

import re
from collections.abc import Sequence

import torch

from kcrprune.checkpoints.layouts.base import Tensors

Rules = Sequence[tuple[str, str]]


def rename(tensors: Tensors, rules: Rules) -> Tensors:
    """The tensors under new names: every rule (pattern, replacement) is tried on every name, in order."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return renamed


def join_qkv(tensors: Tensors) -> Tensors:
    """`x.q`, `x.k` and `x.v` joined to `x.qkv`, as timm has them, for weights and biases; one alone stays as it is."""
    joined: Tensors = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        names = [f"{match[1]}.{part}.{match[3]}" for part in "qkv"] if match else []
        if match is None or not tensors.keys() >= set(names):
            joined[name] = value
        elif match[2] == "q":
            joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat([tensors[part] for part in names])
    return joined


def move_downsampling(tensors: Tensors) -> Tensors:
    """A Swin's patch merging at the start of a stage, where timm has it, in place of the end of the one before."""
    pattern = re.compile(r"^layers\.(\d+)\.downsample")
    return {
        pattern.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample", name): value
        for name, value in tensors.items()
    }


def last_norm(tensors: Tensors) -> Tensors:
    """A detector's Swin has a norm behind each stage it hands out (norm0, norm1, ...): the last is timm's `norm`."""
    behind = [
        match for name in tensors if (match := re.fullmatch(r"(hidden_states_norms\.stage|norm)(\d)\.weight", name))
    ]
    if "norm.weight" in tensors or not behind:
        return tensors
    last = max(behind, key=lambda match: int(match[2]))[0].removesuffix(".weight")
    if tensors[f"{last}.weight"].shape != _last_width(tensors):  # the last stage is not handed out
        return tensors
    return rename(tensors, ((rf"^{re.escape(last)}\.", "norm."),))


def with_norm(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """A Swin without a norm behind its last block, as some backbones are stored, with one; and a sentence on that."""
    width = _last_width(tensors)
    if width is None or "norm.weight" in tensors:
        return tensors, ()
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return tensors | norm, ("no norm behind the last block in the file: one with weights 1 stands there",)


def _last_width(tensors: Tensors) -> torch.Size | None:
    """Of a Swin under timm's names the width of the last stage, as a shape; None for other networks."""
    found = [name for name in tensors if re.fullmatch(r"layers\.\d\.blocks\.0\.norm2\.weight", name)]
    return tensors[max(found)].shape if found else None
