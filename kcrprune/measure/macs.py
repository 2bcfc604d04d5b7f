"""MACs and parameters, as integers.

fvcore counts; the operators that it does not know are supplied here, and one that multiplies matrices and is still
not known is an error, never a warning. Norms and element-wise work are not counted (as in papers' "FLOPs").
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from kcrprune.errors import UnsupportedModelError

ATTENTION = "aten::scaled_dot_product_attention"
# What fvcore counts though papers do not: one operation an element, no multiply-accumulate of a matrix.
ELEMENTWISE = ("aten::layer_norm", "aten::batch_norm", "aten::group_norm", "aten::adaptive_avg_pool2d")
MATRIX_WORDS = ("mm", "matmul", "linear", "conv", "attention", "einsum", "dot", "bilinear")


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of one fused attention: (B * heads * N_query) * N_key * (d_query + d_value)."""
    query, key, value = (tuple(inputs[i].type().sizes()) for i in range(3))
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def no_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Element-wise work multiplies no matrices."""
    return 0


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of `input_size` (channels, height, width), an exact integer.

    Traces one forward pass on the model's own device. UnsupportedModelError names an operator that multiplies
    matrices and cannot be counted.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)
    with _eval_mode(model), _quiet_tracer(), torch.no_grad():
        analysis = FlopCountAnalysis(model, image)
        analysis.set_op_handle(ATTENTION, attention_macs)
        for name in ELEMENTWISE:
            analysis.set_op_handle(name, no_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        total = analysis.total()
        unknown = [name for name in analysis.unsupported_ops() if _multiplies(name)]
    if unknown:
        raise UnsupportedModelError(f"cannot count the MACs of {', '.join(unknown)}; no honest figure exists")
    return round(total)


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


def _multiplies(operator: str) -> bool:
    name = operator.removeprefix("aten::")
    return (
        name not in {"mul", "mul_"} and not name.startswith("upsample") and any(word in name for word in MATRIX_WORDS)
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """The tracer warns of each constant that it meets; what matters to us raises instead."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
