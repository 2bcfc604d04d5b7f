"""What a run is asked to do: every option once, with its meaning, its bounds and its default (no torch)."""

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from kcrprune.errors import ConfigError
from kcrprune.plan import AXES, ROUND_TO, Axis, CropShare, Frozen, ImageSize, Interpolation, Level, Outputs, Spread
from kcrprune.spelling import Latency, NonNegativeInt, PositiveInt, RoundTo, Share, ShareOrNone, as_share

RECIPES: Final = ("default", "thorough", "paper", "no-train")  # kcrprune/recipes/NAME.toml

Dtype = Literal["float32", "float16", "bfloat16"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]  # no mps: it lacks the float64 of the method
Precision = Literal["auto", "fp32", "bf16"]
SWITCHES: Final = {  # what nothing reads while the switch is 0 or false
    "target_latency": ("latency_batch", "latency_table"),
    "search_steps": (
        "search_lr", "search_spread", "search_weight_lr", "search_split", "temperature", "temperature_floor",
    ),
    "recover_steps": ("lr", "warmup_steps", "keep_best"),
    "refit": ("refit_ridge",),
    "reconstruct_epochs": ("reconstruct_lr",),
}  # fmt: skip
NETWORK: Final = (  # how the file with the network is read
    *("arch", "num_heads", "num_classes", "img_size", "outputs"),
    *("mean", "std", "interpolation", "crop_pct"),
)
RENAMED: Final = {"scores": "ranking", "stages": "tighten_steps"}  # old names of settings
Ranking = Literal["auto", "innovation", "fisher", "magnitude", "random", "equal"]


class RunConfig(Frozen):
    """Everything that `kcrprune compress` can be told; a TOML file has the same names, flags win over it."""

    # `default=` is written out, because type checkers take a positional default for a missing argument

    # what to reach
    target_flops: Share = Field(default=0.7, description="Share of the dense MACs to keep, at most.")
    target_latency: Latency = Field(
        default=None, description="In its place: share of the dense time on this machine, at most, or milliseconds."
    )
    latency_batch: PositiveInt | None = Field(
        default=None, description="Images at once that are timed. Else 1 on a CPU and 64 on a GPU."
    )
    latency_table: str | None = Field(
        default=None,
        description="times.json of another run, of this machine or the one to plan for. Else it is measured.",
    )
    recipe: str = Field(default="default", description="Named set of defaults: default, thorough, paper or no-train.")
    axes: tuple[Axis, ...] = Field(
        default=("mlp_hidden", "conv_hidden", "attn_query", "attn_value"),
        description="Axes that may be cut: " + ", ".join(AXES) + ".",
    )
    round_to: RoundTo = Field(
        default=ROUND_TO,
        description="Kept widths are multiples of this; or axis by axis, as mlp_hidden=64,attn_value=16, else of 8.",
    )
    min_width: ShareOrNone = Field(
        default=0.05, description="Smallest share of an axis that a block keeps; 0: whole branches may go, too."
    )
    include: tuple[str, ...] = Field(
        default=(), description="Only blocks whose name matches one of these patterns are cut."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Blocks whose name matches one of these patterns stay whole."
    )

    # the images
    data: str | None = Field(
        default=None, description="Image folder or timm dataset; where there is none, compress generates images."
    )
    dataset: str = Field(
        default="", description="timm dataset type and name, such as hfds/cifar10 or wds/name; '' is a folder."
    )
    train_split: str = Field(default="train", description="Split that is trained on.")
    val_split: str = Field(default="validation", description="Split that is evaluated on.")
    class_map: str | None = Field(default=None, description="File that maps class names to indices.")
    labels: bool = Field(
        default=True, description="Use labels where there are some; without, the task is distillation."
    )
    generated_images: PositiveInt = Field(
        default=2048, description="How many images to generate when there is no data."
    )
    calibration_images: PositiveInt = Field(default=1024, description="Images for balance and refit.")
    score_images: PositiveInt = Field(default=512, description="Images for the channel scores.")
    hflip: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Share of the training images to mirror."
    )
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        default=None, description="Processes that load images. Else half as many as there are cores, from 2 to 8."
    )

    # the network
    arch: str | None = Field(default=None, description="timm name of the network, where the file does not tell.")
    num_heads: PositiveInt | None = Field(
        default=None, description="Heads of every block, where the file does not tell."
    )
    num_classes: PositiveInt | None = Field(
        default=None, description="Give a backbone without a head a new one of this size."
    )
    img_size: ImageSize | None = Field(
        default=None, description="Input size, if not the checkpoint's own: 224, or height and width as 64,16."
    )
    outputs: Outputs | None = Field(
        default=None, description="classes or features: what its outputs are, where the file does not tell."
    )
    mean: tuple[Level, ...] | None = Field(default=None, description="Mean of the input normalisation.")
    std: tuple[Spread, ...] | None = Field(default=None, description="Standard deviation of the input normalisation.")
    interpolation: Interpolation | None = Field(default=None, description="Interpolation of the resize.")
    crop_pct: CropShare | None = Field(default=None, description="Share of the resized image that the crop keeps.")

    # before and after the cut
    ranking: Ranking = Field(
        default="auto", description="What ranks the channels; auto is innovation with a refit, fisher without."
    )
    balance: bool = Field(default=True, description="Rotate each head to its balanced basis first.")
    refit: bool = Field(default=True, description="Refit all linears in closed form after the cut.")
    refit_ridge: PositiveFloat = Field(
        default=1e-3,
        description="Ridge of the refit, as a share of the mean input energy; a hundred times that for the classifier.",
    )
    reconstruct_epochs: NonNegativeInt = Field(
        default=0, description="Passes over the calibration images that train each refitted block by itself; 0: none."
    )
    reconstruct_lr: PositiveFloat = Field(default=3e-4, description="Learning rate of the reconstruction.")

    tighten_steps: PositiveInt = Field(
        default=1, description="Steps in which the budget tightens; each scores, cuts and refits."
    )

    # search and recovery
    search_steps: NonNegativeInt = Field(default=16, description="Steps of a search from the scores on; 0: none.")
    search_lr: PositiveFloat = Field(default=0.05, description="Learning rate of the gates.")
    search_spread: Annotated[float, Field(gt=0, le=1e4)] = Field(
        default=8.0, description="Standard deviation of the first logits; the larger, the fewer gates are undecided."
    )
    search_weight_lr: NonNegativeFloat = Field(
        default=2e-5, description="Learning rate of the weights in the search; 0 freezes."
    )
    search_split: Share = Field(
        default=1,
        description="Share of its images that weights learn on, gates on the rest; 1: both on all, in one step.",
    )
    temperature: PositiveFloat = Field(default=1.0, description="First temperature of the gates.")
    temperature_floor: PositiveFloat = Field(default=0.3, description="Last temperature of the gates.")
    recover_steps: NonNegativeInt = Field(
        default=60,
        description="Training steps, those of a search of both in one step among them where its plan is kept.",
    )
    epochs: PositiveInt | None = Field(
        default=None, description="Length of search and recovery in epochs, where they have any steps."
    )
    batch_size: PositiveInt = Field(default=32, description="Images in a training step.")
    lr: PositiveFloat = Field(default=2e-5, description="Learning rate of the recovery.")
    weight_decay: NonNegativeFloat = Field(
        default=0.05, description="Weight decay of recovery and of a search that trains weights."
    )
    warmup_steps: NonNegativeInt = Field(default=10, description="Linear warm-up of the recovery.")
    clip_grad: PositiveFloat = Field(default=1.0, description="Largest gradient norm.")
    keep_best: bool = Field(
        default=True, description="End the recovery with the weights that did best on held-out images, not the last."
    )

    # the losses
    task: Literal["auto", "labels", "distill"] = Field(
        default="auto", description="Task loss; auto takes both if labelled."
    )
    teacher: str | None = Field(
        default=None, description="Network to stay close to, in place of the one that is cut: a checkpoint or a run."
    )
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Label smoothing.")
    distill_temperature: PositiveFloat = Field(default=1.0, description="Temperature of the distillation.")
    kernel_weight: NonNegativeFloat = Field(default=0.1, description="Weight of the truncated nuclear norm; 0: none.")
    kernel_rank: Share = Field(default=0.05, description="Rank of its basis as a share of min(images, features).")
    kernel_every: PositiveInt = Field(default=20, description="Steps between two refreshes of its basis.")
    kernel_norm: Literal["relative", "raw"] = Field(default="relative", description="Divide it by the trace, or not.")

    # the machine
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=42, description="Seed of everything random.")
    device: Device = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    precision: Precision = Field(
        default="auto", description="auto is bf16 on a GPU that has it and fp32 elsewhere; fp32 has no TF32 either."
    )
    max_memory: PositiveFloat | None = Field(
        default=None, description="GiB of memory that a run may take; what lies beyond is in files. Else what is free."
    )
    max_minutes: PositiveFloat | None = Field(
        default=None, description="Minutes that the run may take; search and recovery end early, and the rest is done."
    )
    snapshot_minutes: PositiveFloat = Field(
        default=5.0, description="Minutes between two snapshots of a long stage; a run that is killed loses no more."
    )
    tensorboard: bool = Field(default=False, description="Write the training's figures for TensorBoard as well.")
    deterministic: bool = Field(
        default=False, description="Take algorithms alone that repeat themselves to the bit on a GPU, too; slower."
    )
    bench: bool = Field(default=True, description="Time the cut network against the dense one, in the end.")
    dtype: Dtype = Field(default="float32", description="What the weights of the cut network are stored in.")

    @property
    def loaders(self) -> int:
        """How many processes load images."""
        return max(2, min(8, (os.cpu_count() or 1) // 2)) if self.workers is None else self.workers

    @property
    def ranked_by(self) -> Ranking:
        """What ranks the channels, `auto` resolved."""
        if self.ranking != "auto":
            return self.ranking
        return "innovation" if self.refit else "fisher"

    @property
    def timed(self) -> bool:
        """Whether the target is a time."""
        return self.target_latency is not None

    @property
    def target_name(self) -> str:
        """The target in a name of a file."""
        time = self.target_latency
        return f"{self.target_flops:g}" if time is None else time if isinstance(time, str) else f"time-{time:g}"

    @property
    def searches(self) -> bool:
        """Whether gates are searched for: where MACs are the target, and, if weights train as well, steps to take."""
        asked = self.search_steps > 0 and not self.timed
        return asked and (self.recover_steps > 0 or not self.searches_jointly)

    @property
    def searches_jointly(self) -> bool:
        """Whether a step of the search trains gates and weights together, on the same images."""
        return self.search_weight_lr > 0 and self.search_split == 1

    def without_effect(self) -> dict[str, str]:
        """Settings that differ from the recipe's and that nothing in this run reads, with what turns them off."""
        usual = RunConfig.model_validate(_recipe(self.recipe))
        return {
            name: f"{switch} = {getattr(self, switch)}".lower()
            for switch, names in SWITCHES.items()
            if not getattr(self, switch)
            for name in names
            if getattr(self, name) != getattr(usual, name)
        }

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        """Where a time is the target, MACs are no limit."""
        if not isinstance(data, dict) or data.get("target_latency") is None:
            return data
        flops, time = data.get("target_flops", 1.0), data["target_latency"]
        if as_share(flops) != 1:
            raise ValueError(f"target_flops = {flops} and target_latency = {time} are two targets; give one of them")
        return {**data, "target_flops": 1.0}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.axes)) != len(self.axes) or not self.axes:
            raise ValueError("axes: name at least one axis, and each once")
        if self.temperature_floor > self.temperature:
            raise ValueError(f"temperature_floor {self.temperature_floor} is above temperature {self.temperature}")
        if self.ranking == "innovation" and not self.refit:
            raise ValueError("ranking innovation prices what a refit makes up for, and refit is off; choose fisher")
        if self.reconstruct_epochs > 0 and not self.refit:
            raise ValueError("reconstruct_epochs train blocks on from their refit, and refit is off; give 0")
        if self.ranking == "equal" and self.tighten_steps > 1:
            raise ValueError("tighten_steps cut before a search, and ranking equal ranks nothing; give tighten_steps 1")
        if self.ranking == "equal" and not self.searches:
            raise ValueError("ranking equal ranks nothing by itself; give search_steps, or choose another ranking")
        return self


def load_config(
    recipe: str | None = None, file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a run: defaults, then the recipe, then the TOML file, then the flags; the later wins."""
    flags = flags or {}
    written = _read_toml(file) if file else {}
    chosen = recipe or flags.get("recipe") or written.get("recipe") or "default"
    try:
        return RunConfig.model_validate({**_recipe(chosen), **written, **flags, "recipe": chosen})
    except ValidationError as error:
        raise ConfigError(_sentence(error, file, flags)) from None


def origins(
    recipe: str | None = None, file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Where `load_config` takes each setting from that is not left at its default: flag, file or recipe."""
    flags = flags or {}
    written = _read_toml(file) if file else {}
    chosen = recipe or flags.get("recipe") or written.get("recipe") or "default"
    layers = {"recipe": _recipe(chosen), "file": written, "flag": {**flags, **({"recipe": 1} if recipe else {})}}
    return {name: layer for layer, values in layers.items() for name in values}


def network_of(config: RunConfig) -> dict[str, Any]:
    """How the file with the network is read, as `open_model` takes it."""
    return {name: getattr(config, name) for name in NETWORK}


def network_config(settings: Mapping[str, Any]) -> RunConfig:
    """A configuration that says how a file is read and nothing else; ConfigError for any other setting."""
    if strange := [name for name in settings if name not in NETWORK]:
        raise ConfigError(f"{strange[0]!r} does not say how a network is read; these do: {', '.join(NETWORK)}")
    return load_config(flags=settings)


def _recipe(name: str) -> dict[str, Any]:
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return tomllib.loads((resources.files("kcrprune") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"{file}: is not a TOML file ({error})") from None


def _sentence(error: ValidationError, file: Path | None, flags: Mapping[str, Any]) -> str:
    """The first complaint of pydantic with the option's name, the value and what the option means."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # about a combination of options
        return reason
    name = str(first["loc"][0])
    where = "" if name in flags else f"{file}: "
    if first["type"] == "extra_forbidden":
        near = [RENAMED[name]] if name in RENAMED else get_close_matches(name, RunConfig.model_fields)
        hint = f"did you mean {' or '.join(near)}?" if near else "`kcrprune compress --help` lists them all"
        return f"{where}there is no option {name!r}; {hint}"
    meaning = (RunConfig.model_fields[name].description or "").rstrip(".")
    reason = "" if first["type"] == "string_pattern_mismatch" else f"{reason[0].lower()}{reason[1:]}; "
    return f"{where}{name} = {first['input']!r} cannot work: {reason}{meaning}"
