"""A network for people without kcrprune: a program that torch alone runs, or a folder that timm opens.

`torch.export.load(path).module()` and `timm.create_model("local-dir:" + folder, pretrained=True)` take them.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import nn

from kcrprune.atomic import taken, write_atomically
from kcrprune.checkpoints.inference import mlp_ratio
from kcrprune.errors import ExportError, OutputExistsError
from kcrprune.plan import Architecture, ChannelPlan, Kept, Preprocessing

TOLERANCE: Final = 1e-5  # ours; relative to the largest output


def save_program(path: Path, model: nn.Module, *, input_size: tuple[int, int, int]) -> None:
    """Writes a .pt2 file for batches of any size.

    It is read back and compared with `model` first; ExportError, and no file, where they differ.
    """
    model = model.eval()
    images = (_images(2, input_size),)
    program = torch.export.export(model, images, dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds this machine's paths

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch warns of names that do not end in .pt2
            torch.export.save(program, file)
        with temporary.open("rb") as file:
            _compare(torch.export.load(file).module(), model, input_size)

    write_atomically(path, write)


def _images(count: int, input_size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def _compare(program: Any, model: nn.Module, input_size: tuple[int, int, int]) -> None:
    for count in (1, 3):
        expected = model(_images(count, input_size))
        error = float((program(_images(count, input_size)) - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise ExportError(f"the program differs from the model by {error:.1e} for {count} images")


def save_for_timm(
    folder: Path,
    model: nn.Module,
    *,
    architecture: Architecture,
    plan: ChannelPlan | None,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None,
) -> None:
    """Writes a folder with weights and timm's config.json; OutputExistsError where `folder` is taken.

    ExportError where timm's arguments cannot say what was cut, or how the network was built.
    """
    folder = Path(folder)
    if folder.exists():
        raise OutputExistsError(taken(folder))
    if architecture.norm_eps is not None:
        raise ExportError(
            f"timm has no argument for the layer norms' epsilon {architecture.norm_eps:g} of this network"
        )
    config = {
        "architecture": architecture.name,
        "model_args": timm_arguments(architecture, plan),
        "num_classes": getattr(model, "num_classes", 0),
        "label_names": class_names and list(class_names),
        "pretrained_cfg": preprocessing.model_dump(mode="json", exclude={"source"}),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        write_atomically(temporary / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
        write_atomically(temporary / "config.json", lambda file: file.write_text(json.dumps(config, indent=2), "utf-8"))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def timm_arguments(architecture: Architecture, plan: ChannelPlan | None) -> dict[str, JsonValue]:
    """Arguments with which timm.create_model builds the shapes of a network.

    Of the axes, timm can say `mlp_hidden` alone: one width for all blocks of a ViT, one for each stage of a Swin.
    """
    arguments = dict(architecture.arguments)
    if plan is None or plan.is_all:
        return arguments
    if plan.gone:
        raise ExportError(f"timm has no network without {min(plan.gone)}, which went as a whole; export a .pt2")
    if not all(kept.is_all for kept in plan.groups if kept.axis != "mlp_hidden"):
        raise ExportError(
            "timm has arguments for a cut of mlp_hidden alone; cut with --axes mlp_hidden, or export a .pt2"
        )
    ratios = [_ratio(hidden, plan) for hidden in _stages(plan)]
    if architecture.family != "swin" and len(set(ratios)) > 1:
        raise ExportError("timm wants one MLP ratio for all stages of this network; export a .pt2 or ONNX file")
    arguments["mlp_ratio"] = list(ratios) if architecture.family == "swin" else ratios[0]
    return arguments


def _stages(plan: ChannelPlan) -> list[list[Kept]]:
    """The hidden units of the blocks by stage: a ViT's are called blocks.<n>, a Swin's layers.<stage>.blocks.<n>."""
    stages: dict[str, list[Kept]] = {}
    for kept in plan.groups:
        if kept.axis == "mlp_hidden":
            stages.setdefault(kept.block.rpartition(".blocks.")[0], []).append(kept)
    return list(stages.values())


def _ratio(hidden: list[Kept], plan: ChannelPlan) -> float:
    widths = {kept.kept_width for kept in hidden}
    if len(widths) != 1:
        raise ExportError(
            f"timm wants one MLP width for these blocks, the plan has {sorted(widths)}; export a .pt2 or ONNX file"
        )
    beside = {kept.axis: kept.heads * kept.width for kept in plan.groups if kept.block == hidden[0].block}
    return mlp_ratio(widths.pop(), beside.get("mlp_io", beside["attn_value"]))
