"""What is known about a model, a run or a file: frozen data that survives JSON."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kcrprune.plan import PER_HEAD, Axis, ChannelPlan, Frozen, Kept, Outputs, Preprocessing

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
State = Literal["dense", "pruned", "onnx"]


class BlockWidths(Frozen):
    """How many channels of each axis one block had and keeps; for the attention axes, channels of one head."""

    site: str
    dense: dict[Axis, PositiveInt]
    kept: dict[Axis, NonNegativeInt]

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.dense.keys() != self.kept.keys() or any(self.kept[axis] > self.dense[axis] for axis in self.dense):
            raise ValueError(f"{self.site}: kept widths {self.kept} do not fit the dense widths {self.dense}")
        return self

    @classmethod
    def of(cls, block: str, entries: Sequence[Kept]) -> Self:
        """The widths that a plan gives to the groups of one block."""
        dense: dict[Axis, int] = {}
        kept: dict[Axis, int] = {}
        for entry in entries:
            dense[entry.axis], kept[entry.axis] = entry.width, entry.kept_width
            if entry.axis in PER_HEAD:
                dense["heads"], kept["heads"] = entry.heads, len(entry.kept_heads)
        return cls(site=block, dense=dense, kept=kept)


def block_widths(plan: ChannelPlan) -> tuple[BlockWidths, ...]:
    """The widths of every block of a plan, from the input to the head."""
    return tuple(BlockWidths.of(block, entries) for block, entries in plan.blocks.items())


class KernelFigures(Frozen):
    """Kernel complexity of the features that enter the classifier, over `images` images."""

    kc: NonNegativeFloat
    h: NonNegativeInt  # the number of eigenvalues at which KC's minimum lies
    tnn: NonNegativeFloat  # truncated nuclear norm beyond `rank`
    kc_normalised: NonNegativeFloat  # KC of the spectrum divided by its trace
    tnn_relative: Share  # TNN divided by the trace
    effective_rank: NonNegativeFloat
    rank: PositiveInt
    images: PositiveInt


class Accuracy(Frozen):
    """What an evaluation over `images` images found; shares between 0 and 1.

    Of classes the first four figures; of features the last three, each against those of the dense network.
    """

    images: PositiveInt
    top1: Share | None = None
    top5: Share | None = None
    loss: float | None = None  # cross-entropy in nats
    agreement: Share | None = None  # how often the dense network names the same class
    distance: NonNegativeFloat | None = None  # relative squared: mean over images of |y - y0|^2 / |y0|^2
    cosine: float | None = None  # mean over images
    retrieval: Share | None = None  # how often the nearest neighbour among the evaluation images is the same one


class Recorded(BaseModel):
    """The figures that an artifact states of itself; whatever else its record holds is left alone."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, strict=True)

    dense_macs: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    kernel: KernelFigures | None = None
    accuracy: Accuracy | None = None


class Timing(Frozen):
    """How long a network takes for so many images at once; where another was timed in turn with it, the ratio, too."""

    batch: PositiveInt
    runtime: str  # what really ran it, such as "PyTorch on the CPU"
    threads: PositiveInt
    rounds: PositiveInt  # in each of which it was called once
    p50_ms: PositiveFloat
    p90_ms: PositiveFloat
    ratio: PositiveFloat | None = None  # of its time to the other's, the median of all rounds
    ratio_low: PositiveFloat | None = None  # ends of the median's interval of 95 %
    ratio_high: PositiveFloat | None = None
    realised: float | None = None  # share of the time saved for each share of the MACs saved; 1 is one for one


class ModelReport(Frozen):
    """The figures of one network; None is what is not known or was not measured."""

    source: str  # the file or folder
    layout: str  # how the file writes its weights, such as "torchvision Swin"
    state: State
    architecture: str | None  # timm's name
    family: str | None
    input_size: tuple[PositiveInt, ...]  # channels, height, width; of a part in memory what it is called with
    outputs: Outputs | None = None
    parameters: NonNegativeInt
    macs: NonNegativeInt | None  # multiply-accumulates of one image
    dense_macs: PositiveInt | None = None  # those of the network before the cut
    file_bytes: NonNegativeInt
    blocks: tuple[BlockWidths, ...] = ()
    kernel: KernelFigures | None = None
    accuracy: Accuracy | None = None
    activation_bytes: PositiveInt | None = None  # the most that is held at once while one image passes
    timings: tuple[Timing, ...] = ()  # one for each batch size
    stated: tuple[str, ...] = ()  # names of the fields above that are the file's own word and were not measured now
    notes: tuple[str, ...] = ()


class StageTime(Frozen):
    """When one stage of a run ended: how long it took, and what memory the process had needed so far."""

    stage: str
    seconds: NonNegativeFloat
    algebra_seconds: NonNegativeFloat = 0  # of these, what decompositions, eliminations and solves took
    passes: NonNegativeFloat | None = None  # the others, in plain passes of the dense network over the same images
    peak_memory_mib: NonNegativeFloat | None = None  # largest resident memory of the process by the stage's end
    peak_device_mib: NonNegativeFloat | None = None  # and of a GPU's, what its tensors took


class Comparison(Frozen):
    """A run's before and after."""

    before: ModelReport
    after: ModelReport
    cut: Accuracy | None = None  # after cut and refit, before recovery
    stages: tuple[StageTime, ...] = ()
    settings: dict[str, JsonValue] = Field(default_factory=dict)  # the options worth reading beside the result
    notes: tuple[str, ...] = ()


class Network(Frozen):
    """A network that timm registers: what of it can be cut, how far, and what stays whole for which reason."""

    name: str
    family: str
    transformer: bool  # it has attention
    axes: tuple[Axis, ...] = ()
    floor: Share | None = None  # smallest share of the MACs that all axes together reach, at the registered size
    whole: dict[str, str] = Field(default_factory=dict)  # classes of attention that stay as they are, and why
    refused: str = ""  # why nothing can be cut


class Inspection(Frozen):
    """What a file is, how we know, and what could be cut; nothing is trained for it."""

    source: str
    layout: str
    architecture: str
    family: str
    preprocessing: Preprocessing
    class_count: NonNegativeInt  # 0 for features
    feature_count: NonNegativeInt = 0  # 0 for classes
    parameters: NonNegativeInt
    macs: PositiveInt
    file_bytes: NonNegativeInt
    axes: tuple[Axis, ...] = ()  # what can be cut
    floor: dict[str, Share] = Field(default_factory=dict)  # recipe to smallest reachable share of the MACs
    notes: tuple[str, ...] = ()  # how each fact is known, a sentence each
    foreign_names: tuple[str, ...] = ()  # names that a pickle mentions; none was imported
