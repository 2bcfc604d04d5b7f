"""What a network is and what a search decided to keep of it: frozen data, no torch."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

Axis = Literal["mlp_io", "mlp_hidden", "conv_hidden", "attn_query", "attn_value", "heads"]
AXES: tuple[Axis, ...] = ("mlp_io", "mlp_hidden", "conv_hidden", "attn_query", "attn_value", "heads")
PER_HEAD: tuple[Axis, ...] = ("attn_query", "attn_value")  # whose widths are those of one head
ROUND_TO = 8  # what kept widths are multiples of, where nobody asks for another

Outputs = Literal["classes", "features"]  # logits of classes, or an embedding whose channels mean nothing alone

Indices = tuple[NonNegativeInt, ...]

# bounds of ours, for flags and for what files state
LARGEST_SIDE: Final = 2048  # of an image, in pixels
MOST_CHANNELS: Final = 64
LEAST_CROP, MOST_CROP = 0.05, 4.0

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
CropMode = Literal["center", "squash", "border"]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Level = Annotated[float, Field(gt=-1e4, lt=1e4)]
Spread = Annotated[float, Field(ge=1e-6, lt=1e4)]
CropShare = Annotated[float, Field(ge=LEAST_CROP, le=MOST_CROP)]


def as_sides(value: Any) -> Any:
    """An image's size in its shortest form: one number for a square, else (height, width).

    Takes what TOML, JSON and the command line say: 224, [224], ["64", "16"], (64, 16); anything else stays as it is.
    """
    if not isinstance(value, list | tuple) or not 0 < len(value) < 3:
        return value
    return value[0] if value[0] == value[-1] else tuple(value)


ImageSize = Annotated[Side | tuple[Side, Side], BeforeValidator(as_sides)]  # one number is height and width


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's size."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: int | tuple[int, int]) -> str:
    """An image's size as the command line takes it: 224, or 64,16."""
    return str(size) if isinstance(size, int) else ",".join(map(str, size))


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

    input_size: tuple[Annotated[int, Field(ge=1, le=MOST_CHANNELS)], Side, Side]  # channels, height, width
    mean: tuple[Level, ...]
    std: tuple[Spread, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: CropShare = 1.0
    crop_mode: CropMode = "center"
    source: str = "the registered model"  # where these values come from

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ValueError(f"mean {self.mean} and std {self.std} are not for {self.input_size[0]} channels")
        return self


class Kept(Frozen):
    """The channels of one group that survive: of each kept head as many, out of `heads` heads of `width` channels.

    The axis `heads` has no entry of its own: which heads of an attention stay, `kept_heads` of its groups say; none
    where it goes as a whole. An MLP goes where its hidden units do.
    """

    site: str  # the branch module
    axis: Axis
    heads: PositiveInt = 1
    width: PositiveInt
    kept_heads: Indices = (0,)
    channels: tuple[Indices, ...]  # one for each kept head

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _require_ascending(self.kept_heads, self.heads, f"{self.axis} of {self.site}: kept heads")
        for indices in self.channels:
            _require_ascending(indices, self.width, f"{self.axis} of {self.site}: kept channels")
        if len(self.channels) != len(self.kept_heads):
            raise ValueError(
                f"{self.axis} of {self.site} describes {len(self.channels)} heads, {len(self.kept_heads)} are kept"
            )
        if len({len(indices) for indices in self.channels}) > 1:
            raise ValueError(f"{self.axis} of {self.site}: every head keeps the same number of channels")
        return self

    @property
    def key(self) -> tuple[str, Axis]:
        """What it is about: site and axis."""
        return self.site, self.axis

    @property
    def block(self) -> str:
        """What users know as the block."""
        return block_of(self.site, self.axis)

    @property
    def kept_width(self) -> int:
        """Channels that each kept head keeps; 0 where nothing stays."""
        return len(self.channels[0]) if self.channels else 0

    @property
    def is_all(self) -> bool:
        """True when nothing is cut."""
        return len(self.kept_heads) == self.heads and self.kept_width == self.width


def block_of(site: str, axis: Axis) -> str:
    """What users know as the block: the module around a branch; an inverted bottleneck is one by itself.

    So is a branch that nothing but the network is around.
    """
    return site if axis == "conv_hidden" else site.rpartition(".")[0] or site


def _require_ascending(indices: Indices, width: int, what: str) -> None:
    if any(a >= b for a, b in pairwise(indices)) or (indices and indices[-1] >= width):
        raise ValueError(f"{what} must be ascending and below the width {width}")


class ChannelPlan(Frozen):
    """The decision for all groups of one network; format 2, and format 1 is brought to it when it is read.

    `stream` is the order, of channels of the dense network, that each of its residual streams has in the cut one, from
    the input on; then what a group keeps of a stream are the first of its channels in that order. None: as they were.
    """

    architecture: str | None  # the timm model name that the plan was made for, where it has one
    groups: tuple[Kept, ...]
    stream: tuple[Indices, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_format_1(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "blocks" not in data:
            return data
        blocks = data["blocks"]
        if not isinstance(blocks, list | tuple) or not all(isinstance(block, dict) for block in blocks):
            raise ValueError("blocks: a list of blocks is wanted")
        try:
            groups = [group for block in blocks for group in _upgraded(block)]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"blocks: {type(error).__name__} {error}") from None
        return {"architecture": data.get("architecture"), "groups": groups}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        heads: dict[str, Indices] = {}
        if len({kept.key for kept in self.groups}) != len(self.groups):
            raise ValueError("a group is named twice")
        for kept in self.groups:
            if heads.setdefault(kept.site, kept.kept_heads) != kept.kept_heads:
                raise ValueError(f"the groups of {kept.site} keep other heads")
        if any(sorted(order) != list(range(len(order))) for order in self.stream or ()):
            raise ValueError("stream: an order names each channel once")
        return self

    def __iter__(self) -> Iterator[Kept]:  # type: ignore[override]
        return iter(self.groups)

    @property
    def is_all(self) -> bool:
        """True when nothing is cut."""
        return all(kept.is_all for kept in self.groups)

    @property
    def gone(self) -> frozenset[str]:
        """The branches that go as a whole: sites of which a group keeps nothing."""
        return frozenset(kept.site for kept in self.groups if kept.kept_width == 0)

    def moved_from(self, other: Self) -> int:
        """How many channels it keeps that another plan for the same network does not."""
        return len(self._kept - other._kept)

    @property
    def _kept(self) -> set[tuple[tuple[str, Axis], int, int]]:
        return {
            (kept.key, head, channel)
            for kept in self.groups
            for head, channels in zip(kept.kept_heads, kept.channels, strict=True)
            for channel in channels
        }

    @property
    def blocks(self) -> dict[str, tuple[Kept, ...]]:
        """The entries of each block, in order; of a block with several branches of one kind, those of each branch."""
        several = Counter((kept.block, kept.axis) for kept in self.groups)
        crowded = {block for (block, _), count in several.items() if count > 1}
        found: dict[str, list[Kept]] = {}
        for kept in self.groups:
            found.setdefault(kept.site if kept.block in crowded else kept.block, []).append(kept)
        return {name: tuple(entries) for name, entries in found.items()}


def _upgraded(block: dict[str, Any]) -> list[dict[str, Any]]:
    """A block of format 1 as entries of format 2."""
    attention, mlp = f"{block['site']}.attn", f"{block['site']}.mlp"
    heads = block["heads"]
    shared = {"site": attention, "heads": heads["width"], "kept_heads": heads["indices"]}
    return [
        *(
            shared
            | {"axis": axis, "width": block[axis][0]["width"], "channels": [kept["indices"] for kept in block[axis]]}
            for axis in ("attn_query", "attn_value")
        ),
        *(
            {"site": mlp, "axis": axis, "width": block[axis]["width"], "channels": [block[axis]["indices"]]}
            for axis in ("mlp_io", "mlp_hidden")
        ),
    ]


def canonical_json(data: Any) -> str:
    """The one JSON text of `data`: sorted keys, no spaces, so that equal data gives equal bytes."""
    import json

    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
