"""How networks are to be timed, as somebody asks for it (no torch)."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from kcrprune.errors import ConfigError
from kcrprune.plan import Frozen
from kcrprune.spelling import PositiveInt

Provider = Literal["cpu", "cuda", "onnx-cpu", "onnx-cuda"]


class Bench(Frozen):
    """How networks are timed."""

    provider: Provider = "cpu"  # PyTorch there (ONNX files: ONNX Runtime); onnx-: all are exported first
    batch: tuple[PositiveInt, ...] = Field(default=(1, 8), min_length=1)  # images at once
    threads: PositiveInt | None = None  # None: what PyTorch takes


def bench_of(**given: Any) -> Bench:
    """How networks are timed; ConfigError names what cannot be."""
    try:
        return Bench.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]} = {given[str(first['loc'][0])]!r} cannot work: {first['msg']}") from None
