"""Weights into a network, and only if every one of them has its place."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kcrprune.checkpoints.clues import as_size
from kcrprune.checkpoints.leftovers import needed_inside, refuse
from kcrprune.checkpoints.shapes import DEEPEST
from kcrprune.checkpoints.signatures import CLASSIFIER, is_registered
from kcrprune.checkpoints.tables import biases, positions
from kcrprune.containers.contents import Shape, check_memory, shapes_of, some
from kcrprune.errors import CheckpointError
from kcrprune.families import build, classifiers
from kcrprune.plan import Architecture, ChannelPlan
from kcrprune.surgery.narrow import cut_

Tensors = dict[str, Tensor]
LARGEST_CUT: Final = 100  # ours; a network cut to a hundredth is no network

# what timm raises for sizes and names that cannot be
UNBUILDABLE: Final = (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError)
# what `inference.difference` writes
ARGUMENTS: Final = {
    "act_layer", "class_token", "depth", "depths", "embed_dim", "fc_norm", "final_norm", "global_pool",
    "img_size", "in_chans", "init_values", "mlp_ratio", "no_embed_class", "num_classes", "num_heads",
    "patch_size", "pos_embed", "pre_norm", "qk_norm", "qkv_bias", "reg_tokens", "scale_attn_norm",
    "scale_mlp_norm", "window_size",
}  # fmt: skip


def load_dense(
    architecture: Architecture, tensors: Tensors, path: Path, *, own: Architecture, new_head: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of an architecture with these weights, and the names of those that it does without.

    `own` is the file's network, of the file's sizes: timm's conversion may rename and resize its tensors.
    CheckpointError for one that has no place and is not training's own.

    The shapes are compared on the meta device first, so that nothing larger than the file is ever built. With
    `new_head` the file has no classifier and the network gets a fresh one.
    """
    outline = build_outline(architecture, path)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    try:
        fitted = fit(tensors, outline, outline if own == architecture else build_outline(own, path))
    except UNBUILDABLE as error:  # timm trusts the names and shapes of what it converts
        raise CheckpointError(f"{path} has tensors that timm cannot convert: {str(error)[:200]}") from error
    heads = {name for name, module in outline.named_modules() if module in classifiers(outline)} if new_head else set()
    wanted = shapes_of(outline.state_dict())
    expected = {name: shape for name, shape in wanted.items() if name.rpartition(".")[0] not in heads}
    check_fit(expected, shapes_of(fitted), path)
    unplaced = (fitted.keys() - wanted.keys()) | _lost(tensors, fitted)
    refuse(needed_inside(unplaced, wanted), path)
    check_memory(_bytes(outline), path)
    model = build_quietly(architecture)
    model.load_state_dict({name: fitted[name] for name in expected}, strict=not new_head)
    return model.float().eval(), tuple(sorted(unplaced))


def _lost(tensors: Tensors, fitted: Tensors) -> set[str]:
    """The tensors that timm's conversion leaves out without a word, such as `pre_logits`."""
    arrived = {value.data_ptr() for value in fitted.values()}
    return {name for name, value in tensors.items() if name not in fitted and value.data_ptr() not in arrived}


def check_finite(tensors: Tensors, path: Path) -> None:
    """CheckpointError that names the weights in which a number is infinite or none."""
    wrong = sorted(
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()) and needed_inside([name])
    )
    if wrong:
        raise CheckpointError(
            f"{path} has weights that are infinite or no numbers in single precision ({len(wrong)} tensors: "
            f"{some(wrong)}); its training has diverged, or it is damaged: take an earlier checkpoint"
        )


def check_outline(
    architecture: Architecture, plan: ChannelPlan | None, shapes: Mapping[str, Shape], path: Path
) -> nn.Module:
    """The outline of a stated network; CheckpointError where it is not that of the file's tensors.

    Built on the meta device, so a false statement costs nothing.
    """
    _check_statement(architecture, path)
    outline = build_outline(architecture, path)
    dense = shapes_of(outline.state_dict())
    check_memory(_bytes(outline), path)
    if plan is not None:
        cut_(outline, plan)
    cut = shapes_of(outline.state_dict())
    check_fit(cut, shapes, path)
    if shapes.keys() != cut.keys():
        raise CheckpointError(
            f"{path} holds tensors that its network has no place for: {some(sorted(shapes.keys() - cut))}"
        )
    if _count(dense) > LARGEST_CUT * max(_count(cut), 10**5):
        raise CheckpointError(f"{path} states a dense network more than {LARGEST_CUT} times as large as its weights")
    return outline


def _check_statement(architecture: Architecture, path: Path) -> None:
    """CheckpointError for names that would fetch or read something, and for a depth that would take for ever."""
    arguments = architecture.arguments
    if not is_registered(architecture.name) or not arguments.keys() <= ARGUMENTS:
        raise CheckpointError(
            f"{path} names a network or an argument that kcrprune does not know: {architecture.name[:80]}"
        )
    if "img_size" in arguments and as_size(arguments["img_size"]) is None:
        raise CheckpointError(f"{path} states an image size that cannot be: {str(arguments['img_size'])[:80]}")
    stated = arguments.get("depths", arguments.get("depth", 1))
    depths = stated if isinstance(stated, list) else [stated]
    if len(depths) > DEEPEST or not all(type(depth) is int and 0 < depth <= DEEPEST for depth in depths):
        raise CheckpointError(f"{path} states a depth that cannot be: {str(stated)[:80]}")


def built_for_size(model: nn.Module) -> bool:
    """Whether timm builds a network for images of a size, in its class or in one that it is of."""
    return any("img_size" in signature(cls.__init__).parameters for cls in type(model).__mro__)


def build_outline(architecture: Architecture, path: Path) -> nn.Module:
    """A network on the meta device, where it takes no memory; CheckpointError for what timm cannot build."""
    try:
        return build_quietly(architecture, device="meta")
    except UNBUILDABLE as error:
        raise CheckpointError(f"{path} states a network that timm cannot build: {str(error)[:200]}") from error


def build_quietly(architecture: Architecture, *, device: str = "cpu") -> nn.Module:
    """`build`, with fresh weights that depend on nothing, and leaving the caller's random state alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build(architecture, device=device)


def fit(tensors: Tensors, model: nn.Module, own: nn.Module) -> Tensors:
    """The weights under the names and in the sizes that `model` wants, by timm's own conversion.

    Tables of positions of two sides are resized from the sizes of `own`, since timm's conversion takes each for a
    square where it can.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the speed of an interpolation inside timm
        resized = positions(tensors, model, own) | biases(tensors, model, own)
        if not resized and _are_its_own(tensors, shapes_of(model.state_dict())):
            return tensors
        rest = {name: value for name, value in tensors.items() if name == "pos_embed" or name not in resized}
        if isinstance(model, VisionTransformer):
            return vision_transformer.checkpoint_filter_fn(rest, model, adapt_layer_scale=True) | resized
        module = import_module(type(model).__module__)  # where timm keeps the conversion of a class
        convert: Any = getattr(module, "checkpoint_filter_fn", lambda tensors, model: tensors)
        return convert(rest, model) | resized


def _are_its_own(tensors: Tensors, wanted: Mapping[str, Shape]) -> bool:
    """Whether tensors have the names and shapes of a network's, whatever it is; its classifier may be missing."""
    alike = all(wanted.get(name) == tuple(value.shape) for name, value in tensors.items())
    return alike and all(CLASSIFIER.match(name) for name in wanted.keys() - tensors.keys())


def check_fit(wanted: Mapping[str, Shape], given: Mapping[str, Shape], path: Path) -> None:
    """CheckpointError where a tensor is missing or has another shape."""
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its network: {some(missing)}")
    for name in sorted(wanted):
        if given[name] != wanted[name]:
            raise CheckpointError(f"{path}: {name} has the shape {given[name]}, its network wants {wanted[name]}")


def _bytes(outline: nn.Module) -> int:
    """What a network takes in memory twice, as it is built and as it is read.

    Buffers count: a Swin's attention masks grow with the image.
    """
    buffers = sum(buffer.numel() for buffer in outline.buffers())
    return 2 * 4 * (_count(shapes_of(outline.state_dict())) + buffers)


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())
