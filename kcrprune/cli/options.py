"""The options of the commands: every setting of `RunConfig` as a flag, and the few that are no settings."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from kcrprune.config import RunConfig
from kcrprune.measure.bench import Provider
from kcrprune.spelling import Latency, RoundTo, Share, ShareOrNone

PANELS: Final = {  # the first setting of each group in the help
    "target_flops": "What to reach",
    "data": "The images",
    "arch": "The network, where its file does not tell",
    "ranking": "Before and after the cut",
    "search_steps": "Search and recovery",
    "task": "The losses",
    "seed": "The machine",
}
SHAPES: Final = {
    "img_size": "SIDE|H,W",
    "round_to": "WIDTH|AXIS=WIDTH,...",
    "target_latency": "SHARE|MSms",
    "latency_table": "FILE",
}
WRITTEN: Final = (Share, ShareOrNone, RoundTo, Latency)  # settings that configuration reads from text itself
SHORT: Final = {"batch_size": "-b", "workers": "-j"}  # timm's letters

IMAGES: Final = ("data", "dataset", "val_split", "class_map", "workers", "batch_size", "device")

Format = Literal["table", "json", "markdown"]
Form = Literal["onnx", "pt2", "timm"]

CheckpointArg = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A file with weights, its folder, or a name of the Hugging Face hub (timm/NAME, hf-hub:ORG/NAME).",
    ),
]
FileArg = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="Anything that may hold weights, or a name of the hub; nothing in it is run."),
]
ListOpt = Annotated[
    bool, typer.Option("--list", help="In place of a file: which of timm's networks can be cut, and how far.")
]
ModelArg = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A checkpoint, a name of the hub, a run's folder or an ONNX file.")
]
OtherArg = Annotated[Path | None, typer.Argument(metavar="OTHER", help="A second one, to compare.")]
RunArg = Annotated[
    Path | None,
    typer.Argument(metavar="MODEL", help="A checkpoint or a run's folder; else the newest run below this folder."),
]
ConfigOpt = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings; flags win over it.")
]
OutOpt = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of this run; else kcrprune-runs/NAME.")
]
FreshOpt = Annotated[
    bool, typer.Option("--fresh", help="Start anew, where the same run is there already; under another name.")
]
OnnxOpt = Annotated[
    Path | None,
    typer.Option("--onnx", metavar="[FILE]", help="Write ONNX to FILE; without FILE, beside the model."),
]
FormOpt = Annotated[
    Form,
    typer.Option("--format", "-f", help="onnx, a program of torch.export (pt2), or a folder that timm opens."),
]
FileOpt = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to write it; else beside the model.")
]
IntoOpt = Annotated[
    Path | None,
    typer.Option("--into", metavar="FILE", help="Write FILE, which the model was made of, anew with its cut tensors."),
]
ShapesOpt = Annotated[
    bool, typer.Option("--keep-shapes", help="With --into: zeros where it was cut, for code that knows of no cut.")
]
OpsetOpt = Annotated[int, typer.Option("--opset", help="ONNX opset to write: 17 to 23; older runtimes want 17.")]
BenchOpt = Annotated[bool, typer.Option("--bench", help="Measure times, too, of two models in turn.")]
ProviderOpt = Annotated[
    Provider,
    typer.Option(
        "--provider", help="Where: PyTorch on cpu or cuda (ONNX files: ONNX Runtime); onnx-: all exported first."
    ),
]
BatchOpt = Annotated[str, typer.Option("--batch", metavar="A,B,...", help="Images at once, one table row each.")]
ThreadsOpt = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Threads of the CPU; else what PyTorch takes.")
]
FormatOpt = Annotated[Format, typer.Option("--format", "-f", help="How to print it.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only warnings and the result.")]


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds an option for each named setting (all, if none is named); `given` receives those that were used."""
    chosen = names or tuple(RunConfig.model_fields)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_settings(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in chosen}
            given = {name: _split(name, value) for name, value in values.items() if value is not None}
            command(**arguments, given=given)

        own = [parameter for name, parameter in signature(command).parameters.items() if name != "given"]
        with_settings.__signature__ = Signature([*own, *map(_option, chosen)])  # type: ignore[attr-defined]
        return with_settings

    return decorate


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes one section for each panel."""
        for title, rows in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows)


def sections(command: TyperCommand, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """A command's options with their help by panel: arguments, its own, then the settings."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        own = "Arguments" if parameter.param_type_name == "argument" else "Options"
        if record := parameter.get_help_record(ctx):
            found.setdefault(getattr(parameter, "rich_help_panel", None) or own, []).append(record)
    return dict(sorted(found.items(), key=lambda item: item[0] in PANELS.values()))  # settings last; the sort is stable


class OnnxCommand(GroupedCommand):
    """A command whose `--onnx` may stand without a file name, which Typer cannot express."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Gives a bare `--onnx` an empty value."""
        followers = [*args, "-"][1:]
        bare = [arg == "--onnx" and follower.startswith("-") for arg, follower in zip(args, followers, strict=True)]
        return super().parse_args(ctx, ["--onnx=" if empty else arg for arg, empty in zip(args, bare, strict=True)])


def flag(name: str) -> str:
    """The long flag of a setting."""
    return f"--{name.replace('_', '-')}"


def panel(name: str) -> str:
    """The group of the help that a setting stands in."""
    title = "Settings"
    for field in RunConfig.model_fields:
        title = PANELS.get(field, title)
        if field == name:
            break
    return title


def _option(name: str) -> Parameter:
    kind = _kind(name)
    declarations = [SHORT[name]] if name in SHORT else []
    declarations.append(f"{flag(name)}/--no-{name.replace('_', '-')}" if kind is bool else flag(name))
    info = typer.Option(
        *declarations,
        help=_help(name),
        metavar=SHAPES.get(name, {tuple: "A,B,...", Share: "SHARE", ShareOrNone: "SHARE"}.get(kind)),
        rich_help_panel=panel(name),
        show_default=False,
    )
    annotation = Annotated[Union[str if kind in (tuple, *WRITTEN) else kind, None], info]  # noqa: UP007 (`kind` is a value)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(name: str) -> Any:
    """The type of a setting as Typer knows it; `tuple` for lists, which are written with commas, or one of WRITTEN."""
    field = RunConfig.model_fields[name]
    for written in WRITTEN:
        if get_args(written)[1] in field.metadata:  # pydantic's own words are float and int
            return written
    kinds = _members(field.annotation)
    return tuple if any(get_origin(kind) is tuple for kind in kinds) else kinds[0]


def _members(annotation: Any) -> list[Any]:
    """The types that an annotation admits, without None."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _members(member) if kind is not NoneType]
    return _members(get_args(annotation)[0]) if get_origin(annotation) is Annotated else [annotation]


def _help(name: str) -> str:
    field = RunConfig.model_fields[name]
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    if default is None or default == "":
        return str(field.description)
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{field.description} [default: {default}]"


def _split(name: str, value: Any) -> Any:
    if _kind(name) is not tuple:
        return value
    return [part.strip() for part in value.split(",") if part.strip()]
