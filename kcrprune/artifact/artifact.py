"""The artifact of kcrprune: one safetensors file with weights, plan, architecture, preprocessing and record.

Everything but the weights lies in one metadata key as canonical JSON, since several keys would be written in random
order; equal networks and records give equal bytes. A hash over the weights is checked when the file is opened.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kcrprune.atomic import taken, write_atomically
from kcrprune.checkpoints.clues import ASKED, as_size
from kcrprune.checkpoints.dense import Opened, open_dense
from kcrprune.checkpoints.hub import fetched
from kcrprune.checkpoints.loading import build_quietly, built_for_size, check_finite, check_outline, fit
from kcrprune.checkpoints.preprocessing import Flags, overridden
from kcrprune.checkpoints.shapes import Shapes, classes_of
from kcrprune.containers.contents import digest, read_all
from kcrprune.containers.safetensors_file import Header, is_safetensors, read_header
from kcrprune.containers.strict_json import parse_object
from kcrprune.errors import CheckpointError, ConfigError, KcrPruneError, OutputExistsError
from kcrprune.families import outputs_of
from kcrprune.measure.report import Recorded
from kcrprune.plan import (
    Architecture,
    ChannelPlan,
    Frozen,
    Outputs,
    Preprocessing,
    as_sides,
    canonical_json,
    sides,
    size_text,
)
from kcrprune.surgery.narrow import cut_

OWN_FORMAT: Final = 3  # of files with a network that only its user can build; see given
FORMAT: Final = 2  # raised when a file can no longer be read by an older kcrprune
KEY: Final = "kcrprune"
DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODEL_FILE: Final = "model.safetensors"  # the artifact inside a run folder


class Contract(Frozen):
    """What the metadata key holds."""

    format: int
    architecture: Architecture
    plan: ChannelPlan | None
    preprocessing: Preprocessing
    outputs: Outputs | None = None  # None, in files of before: as the last layer says
    class_names: tuple[str, ...] | None
    record: dict[str, JsonValue] = Field(default_factory=dict)
    content_hash: str


def save_model(
    path: Path,
    model: nn.Module,
    *,
    architecture: Architecture,
    plan: ChannelPlan | None,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None,
    record: Mapping[str, JsonValue],
    outputs: Outputs | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a dense or pruned network; OutputExistsError where `path` is taken.

    `outputs` None: as its last layer says; `dtype` None: its parameters are stored as they are.
    """

    def contract(tensors: Mapping[str, Tensor]) -> Contract:
        return Contract(
            format=FORMAT,
            architecture=architecture,
            plan=plan,
            preprocessing=preprocessing,
            outputs=outputs or outputs_of(model),
            class_names=class_names,
            record=dict(record),
            content_hash=content_hash(tensors),
        )

    write_tensors(Path(path), model, contract, dtype)


def write_tensors(
    path: Path, model: nn.Module, contract: Callable[[Mapping[str, Tensor]], Frozen], dtype: torch.dtype | None
) -> None:
    """Writes the tensors of a network, and what `contract` says of them; OutputExistsError where `path` is taken."""
    if path.exists():
        raise OutputExistsError(taken(path))
    learned = dict(model.named_parameters())
    stored = {name: value.to(dtype) if name in learned else value for name, value in model.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in stored.items()}
    text = canonical_json(contract(tensors).model_dump(mode="json"))

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {KEY: text})
        except SafetensorError as error:
            raise KcrPruneError(f"cannot write {path}: {error}") from error

    write_atomically(path, write, needed=sum(value.nbytes for value in tensors.values()))


@torch.no_grad()
def rounded_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds the parameters to what `dtype` can hold; ConfigError names one that is too large for it."""
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype).to(parameter.dtype)
        if not torch.equal(rounded.isfinite(), parameter.isfinite()):
            raise ConfigError(f"{name} holds values that {dtype} is too small for; choose --dtype bfloat16 or float32")
        parameter.copy_(rounded)
    return model


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes of some tensors, in the order of their names."""
    total = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(canonical_json([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def is_artifact(path: Path) -> bool:
    """Whether a file, or the model of a folder, is of kcrprune's making."""
    file = path / MODEL_FILE if path.is_dir() else path
    return file.is_file() and is_safetensors(file) and KEY in read_header(file).metadata


def open_model(path: Path, **overrides: Any) -> Opened:
    """The network in an artifact, a run folder, or (`open_dense`) any checkpoint that somebody else wrote.

    `overrides` are the keywords of `open_dense`; an artifact takes those of the preprocessing,
    `img_size` and `outputs`. A name of the Hugging Face hub is fetched first (`checkpoints/hub.py`).
    """
    try:
        if found := fetched(Path(path)):
            opened = _open(found.weights, overrides)
            return replace(opened, fetched=found, notes=(found.note, *opened.notes))
        return _open(Path(path), overrides)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def _open(path: Path, overrides: Mapping[str, Any]) -> Opened:
    file = path / MODEL_FILE if path.is_dir() else path
    if file.is_file() and is_safetensors(file):
        header = read_header(file)
        if KEY in header.metadata:
            return _open_artifact(file, header, overrides)
    return open_dense(path, **overrides)


def _open_artifact(path: Path, header: Header, overrides: Mapping[str, Any]) -> Opened:
    contract = _contract(path, header.metadata[KEY])
    stated = {key: value for key, value in overrides.items() if value is not None}
    asked, size = stated.pop("outputs", None), as_sides(stated.pop("img_size", None))
    flags = Flags(**{key: stated.pop(key) for key in tuple(stated) if key in Flags.__dataclass_fields__})
    if stated:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(stated))
        raise ConfigError(f"{path} is a kcrprune artifact and knows its network; leave {names} out")
    shapes = {name: ref.shape for name, ref in header.tensors.items()}
    outline = check_outline(contract.architecture, contract.plan, shapes, path)
    _check_use(contract, outline, shapes, path)
    tensors = read_all(header.tensors, path.stat().st_size, path)
    if content_hash(tensors) != contract.content_hash:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were written (content hash differs)")
    check_finite(tensors, path)
    contract, notes = _sized(contract, size, outline)
    model = build_quietly(contract.architecture)
    if contract.plan is not None:
        cut_(model, contract.plan)
    model.load_state_dict(fit(tensors, model, outline) if notes else tensors, strict=True)
    own = outputs_of(model)
    outputs = "features" if own == "features" else asked or contract.outputs or own
    return Opened(
        model=model.eval(),
        architecture=contract.architecture,
        preprocessing=overridden(contract.preprocessing, flags),
        plan=contract.plan,
        outputs=outputs,
        class_names=contract.class_names if outputs == "classes" else None,
        layout="kcrprune artifact",
        notes=("architecture, plan and preprocessing: written by kcrprune, content hash verified", *notes),
        path=path,
        digest=digest([path]),
        file_bytes=path.stat().st_size,
        record=dict(contract.record),
    )


def _sized(contract: Contract, size: int | tuple[int, int] | None, outline: Any) -> tuple[Contract, tuple[str, ...]]:
    """The contract of the same network at another image size, without the figures of its own; and a note on that."""
    channels, height, width = contract.preprocessing.input_size
    if size is None or sides(size) == (height, width):
        return contract, ()
    built_for = built_for_size(outline)
    patches = getattr(outline, "patch_embed", None)
    if built_for and patches is None:
        raise ConfigError(f"--img-size {size_text(size)}: a {type(outline).__name__} keeps the size that it was cut at")
    patch = getattr(patches, "patch_size", (1, 1))
    if any(side % step for side, step in zip(sides(size), patch, strict=True)):
        raise ConfigError(f"--img-size {size_text(size)} is no multiple of the patch size {size_text(patch)}")
    told = {"img_size": size if isinstance(size, int) else list(size)} if built_for else {}
    arguments = contract.architecture.arguments | told
    changed = {
        "architecture": contract.architecture.model_copy(update={"arguments": arguments}),
        "preprocessing": contract.preprocessing.model_copy(update={"input_size": (channels, *sides(size))}),
        "record": {key: value for key, value in contract.record.items() if key in ("config", "dense_digest")},
    }
    change = f"image size {size_text(size)} in place of {size_text(as_sides((height, width)))}"
    return contract.model_copy(update=changed), (f"{change}: {ASKED}; tables of positions are resized",)


def _check_use(contract: Contract, outline: Any, shapes: Shapes, path: Path) -> None:
    """CheckpointError where images or class names are not those of the network's inputs and outputs."""
    first = next(module for module in outline.modules() if isinstance(module, nn.Conv2d))
    size = as_size(getattr(getattr(outline, "patch_embed", None), "img_size", None))
    takes = (first.in_channels, *(sides(size) if size else contract.preprocessing.input_size[1:]))
    if contract.preprocessing.input_size != takes:
        raise CheckpointError(
            f"{path} prepares images of {contract.preprocessing.input_size}, its network takes {takes} (channels, "
            "height, width)"
        )
    names, classes = contract.class_names, classes_of(shapes)
    if names is not None and classes and len(names) != classes:
        raise CheckpointError(f"{path} names {len(names)} classes, its network has {classes}")


def _contract(path: Path, text: str) -> Contract:
    raw = parse_object(text.encode(), f"the kcrprune metadata of {path}")
    written = raw.get("format")
    if type(written) is not int or written < 1:
        raise CheckpointError(f"{path} states no format version in its kcrprune metadata")
    if "network" in raw:
        raise CheckpointError(
            f"{path} holds a {raw['network']}, which only its own code builds; kcrprune.restore(dense, path) cuts a "
            "dense one to it"
        )
    if written > FORMAT:
        raise CheckpointError(
            f"{path} has format {written} and this kcrprune reads up to {FORMAT}; "
            "`pip install -U kcrprune` gives a newer one"
        )
    try:
        contract = Contract.model_validate(raw)
        Recorded.model_validate_json(canonical_json(contract.record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise CheckpointError(f"{path} has damaged kcrprune metadata: {where}: {first['msg']}") from error
    return contract
