"""The artifact of kcrprune: one safetensors file with weights, plan, architecture, preprocessing and record.

Everything but the weights lies in one metadata key as canonical JSON, since several keys would be written in random
order; equal networks and records give equal bytes. A hash over the weights is checked when the file is opened.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kcrprune.atomic import taken, write_atomically
from kcrprune.checkpoints.dense import Opened, open_dense
from kcrprune.checkpoints.loading import build_quietly, check_outline
from kcrprune.checkpoints.preprocessing import Flags, overridden
from kcrprune.containers.contents import digest, read_all
from kcrprune.containers.safetensors_file import Header, is_safetensors, read_header
from kcrprune.containers.strict_json import parse_object
from kcrprune.errors import CheckpointError, ConfigError, KcrPruneError, OutputExistsError
from kcrprune.plan import Architecture, ChannelPlan, Frozen, Preprocessing, canonical_json
from kcrprune.surgery.narrow import cut_

FORMAT: Final = 2  # raised when a file can no longer be read by an older kcrprune
KEY: Final = "kcrprune"
MODEL_FILE: Final = "model.safetensors"  # the artifact inside a run folder


class Contract(Frozen):
    """What the metadata key holds."""

    format: int
    architecture: Architecture
    plan: ChannelPlan | None
    preprocessing: Preprocessing
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
) -> None:
    """Writes a dense or pruned network; OutputExistsError where `path` is taken."""
    path = Path(path)
    if path.exists():
        raise OutputExistsError(taken(path))
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    contract = Contract(
        format=FORMAT,
        architecture=architecture,
        plan=plan,
        preprocessing=preprocessing,
        class_names=class_names,
        record=dict(record),
        content_hash=content_hash(tensors),
    )
    text = canonical_json(contract.model_dump(mode="json"))

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {KEY: text})
        except SafetensorError as error:
            raise KcrPruneError(f"cannot write {path}: {error}") from error

    write_atomically(path, write, needed=sum(value.nbytes for value in tensors.values()))


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes of some tensors, in the order of their names."""
    total = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(canonical_json([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def open_model(path: Path, **overrides: Any) -> Opened:
    """The network in an artifact, a run folder, or (`open_dense`) any checkpoint that somebody else wrote.

    `overrides` are the keywords of `open_dense`; an artifact takes those of the preprocessing alone.
    """
    path = Path(path)
    try:
        file = path / MODEL_FILE if path.is_dir() else path
        if file.is_file() and is_safetensors(file):
            header = read_header(file)
            if KEY in header.metadata:
                return _open_artifact(file, header, overrides)
        return open_dense(path, **overrides)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def _open_artifact(path: Path, header: Header, overrides: Mapping[str, Any]) -> Opened:
    contract = _contract(path, header.metadata[KEY])
    stated = {key: value for key, value in overrides.items() if value is not None}
    flags = Flags(**{key: stated.pop(key) for key in tuple(stated) if key in Flags.__dataclass_fields__})
    if stated:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(stated))
        raise ConfigError(f"{path} is a kcrprune artifact and knows its network; leave {names} out")
    shapes = {name: ref.shape for name, ref in header.tensors.items()}
    check_outline(contract.architecture, contract.plan, shapes, path)
    tensors = read_all(header.tensors, path.stat().st_size, path)
    if content_hash(tensors) != contract.content_hash:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were written (content hash differs)")
    model = build_quietly(contract.architecture)
    if contract.plan is not None:
        cut_(model, contract.plan)
    model.load_state_dict(tensors, strict=True)
    return Opened(
        model=model.eval(),
        architecture=contract.architecture,
        preprocessing=overridden(contract.preprocessing, flags),
        plan=contract.plan,
        class_names=contract.class_names,
        layout="kcrprune artifact",
        notes=("architecture, plan and preprocessing: written by kcrprune, content hash verified",),
        path=path,
        digest=digest([path]),
        record=dict(contract.record),
    )


def _contract(path: Path, text: str) -> Contract:
    raw = parse_object(text.encode(), f"the kcrprune metadata of {path}")
    written = raw.get("format")
    if type(written) is not int or written < 1:
        raise CheckpointError(f"{path} states no format version in its kcrprune metadata")
    if written > FORMAT:
        raise CheckpointError(
            f"{path} has format {written} and this kcrprune reads up to {FORMAT}; "
            "`pip install -U kcrprune` gives a newer one"
        )
    try:
        return Contract.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise CheckpointError(f"{path} has damaged kcrprune metadata: {where}: {first['msg']}") from error
