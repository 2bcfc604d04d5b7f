"""What a network is and what a search decided to keep of it: frozen data, no torch."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

Axis = Literal["mlp_io", "mlp_hidden", "attn_query", "attn_value", "heads"]
AXES: tuple[Axis, ...] = ("mlp_io", "mlp_hidden", "attn_query", "attn_value", "heads")

Indices = tuple[NonNegativeInt, ...]


class Frozen(BaseModel):
    """Immutable data in which an unknown field is an error, and so is a number that is infinite or nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(Frozen):
    """Enough to build a dense network: a timm model name and the arguments that differ from its defaults."""

    family: str
    name: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    norm_eps: float | None = None  # where a checkpoint's layer norms use another epsilon than timm's


class Preprocessing(Frozen):
    """How an image becomes an input; timm's own names."""

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: Annotated[float, Field(gt=0)] = 1.0
    crop_mode: str = "center"
    source: str = "the registered model"  # where these values come from


class Kept(Frozen):
    """The channels of one axis that survive: `indices` out of `width`, ascending."""

    width: PositiveInt
    indices: Indices

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        ascending = all(a < b for a, b in pairwise(self.indices))
        if not self.indices or not ascending or self.indices[-1] >= self.width:
            raise ValueError(f"kept indices must be ascending, below the width {self.width}, and at least one")
        return self

    @property
    def is_all(self) -> bool:
        """True when nothing is cut."""
        return len(self.indices) == self.width

    @classmethod
    def all_of(cls, width: int) -> Self:
        """Everything kept."""
        return cls(width=width, indices=tuple(range(width)))


class BlockPlan(Frozen):
    """What one block keeps.

    `attn_query` and `attn_value` hold one `Kept` for each *kept* head, in the order of `heads.indices`;
    every head of a block keeps the same number of channels.
    """

    site: str
    mlp_io: Kept
    mlp_hidden: Kept
    heads: Kept
    attn_query: tuple[Kept, ...]
    attn_value: tuple[Kept, ...]

    @model_validator(mode="after")
    def _equal_heads(self) -> Self:
        for axis in ("attn_query", "attn_value"):
            per_head = getattr(self, axis)
            if len(per_head) != len(self.heads.indices):
                raise ValueError(f"{axis} describes {len(per_head)} heads, {len(self.heads.indices)} are kept")
            if len({(kept.width, len(kept.indices)) for kept in per_head}) != 1:
                raise ValueError(f"{axis}: every head of a block keeps the same number of channels")
        return self

    @property
    def is_all(self) -> bool:
        """True when nothing of this block is cut."""
        whole = (self.mlp_io, self.mlp_hidden, self.heads, *self.attn_query, *self.attn_value)
        return all(kept.is_all for kept in whole)

    @property
    def widths(self) -> dict[Axis, int]:
        """Kept channels by axis; for the two attention axes, channels of one head."""
        return {
            "mlp_io": len(self.mlp_io.indices),
            "mlp_hidden": len(self.mlp_hidden.indices),
            "attn_query": len(self.attn_query[0].indices),
            "attn_value": len(self.attn_value[0].indices),
            "heads": len(self.heads.indices),
        }


class ChannelPlan(Frozen):
    """The decision for all blocks of one architecture."""

    architecture: str  # the timm model name that the plan was made for
    blocks: tuple[BlockPlan, ...]

    def __iter__(self) -> Iterator[BlockPlan]:  # type: ignore[override]
        return iter(self.blocks)

    @property
    def is_all(self) -> bool:
        """True when nothing is cut."""
        return all(block.is_all for block in self.blocks)


def canonical_json(data: Any) -> str:
    """The one JSON text of `data`: sorted keys, no spaces, so that equal data gives equal bytes."""
    import json

    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
