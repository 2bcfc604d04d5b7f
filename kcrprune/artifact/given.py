"""A cut network of a class that only its user can build: written with its plan, and cut again out of a dense one."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from torch import nn

from kcrprune.artifact.artifact import KEY, MODEL_FILE, OWN_FORMAT, content_hash, write_tensors
from kcrprune.checkpoints.loading import check_finite
from kcrprune.containers.contents import read_all
from kcrprune.containers.safetensors_file import is_safetensors, read_header
from kcrprune.containers.strict_json import parse_object
from kcrprune.errors import CheckpointError, OutputExistsError, PlanMismatchError
from kcrprune.families import BLOCKS, RULES, Given, find_groups
from kcrprune.families.contract import Rules, class_name
from kcrprune.families.given import Use
from kcrprune.plan import ChannelPlan, Frozen
from kcrprune.surgery.narrow import cut_

ATTRIBUTE: Final = "kcrprune_origin"  # of the module; copies and pickles of it keep it


@dataclass(frozen=True)
class Origin:
    """How a network in memory was cut."""

    network: str  # module:Class
    part: str
    plan: ChannelPlan


class OwnContract(Frozen):
    """What the metadata key holds."""

    format: int
    network: str
    part: str
    plan: ChannelPlan
    content_hash: str


def save_given(path: Path, model: nn.Module, origin: Origin, dtype: torch.dtype | None = None) -> None:
    """Writes the tensors of a cut network and its plan; OutputExistsError where `path` is taken.

    `dtype` None: parameters are stored as they are.
    """
    write_tensors(
        path,
        model,
        lambda tensors: OwnContract(format=OWN_FORMAT, **vars(origin), content_hash=content_hash(tensors)),
        dtype,
    )


def restored(dense: nn.Module, path: Path, rules: Rules) -> nn.Module:
    """A copy of a dense network, cut and with the weights that a file holds; in eval mode, with its origin noted.

    CheckpointError for a file that is damaged or not of this kind, PlanMismatchError for one of another network.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    contract, tensors = _read(file)
    if contract.network != (own := class_name(type(dense))):
        raise PlanMismatchError(f"{path} holds a {contract.network}, and the network is a {own}")
    planned = {kept.site for kept in contract.plan.groups}
    groups = tuple(group for group in find_groups(dense, {**RULES, **rules}, BLOCKS) if group.site in planned)
    given = Given(copy.deepcopy(dense), Use(part=contract.part), groups)
    cut_(given, contract.plan)
    own_tensors = given.state_dict()
    for name in own_tensors.keys() | tensors.keys():
        if name not in tensors or name not in own_tensors or tensors[name].shape != own_tensors[name].shape:
            raise PlanMismatchError(
                f"{path}: {name} is not of one size in the file and in this network, cut as it says"
            )
    given.load_state_dict(tensors)
    for name, weight in given.inside.named_parameters():
        weight.requires_grad_(name not in given.frozen)
    return noted(given.inside.eval(), Origin(contract.network, contract.part, contract.plan))


def noted(model: nn.Module, origin: Origin) -> nn.Module:
    """The network with its origin on it, so that it can be stored again."""
    setattr(model, ATTRIBUTE, origin)
    return model


def _read(path: Path) -> tuple[OwnContract, dict[str, torch.Tensor]]:
    if not path.is_file() or not is_safetensors(path) or KEY not in (header := read_header(path)).metadata:
        raise CheckpointError(f"{path} is no file that kcrprune.save has written")
    raw = parse_object(header.metadata[KEY].encode(), f"the kcrprune metadata of {path}")
    if "network" not in raw:
        raise CheckpointError(f"{path} holds a network that kcrprune builds itself; kcrprune.load opens it")
    try:
        contract = OwnContract.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path} has damaged kcrprune metadata: {error.errors()[0]['msg']}") from error
    tensors = read_all(header.tensors, path.stat().st_size, path)
    if content_hash(tensors) != contract.content_hash:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were written (content hash differs)")
    check_finite(tensors, path)
    return contract, tensors


def save_origin(model: nn.Module, origin: Origin, folder: Path) -> Path:
    """Stores a network that was trained on since, in a folder; OutputExistsError where it holds a model."""
    path = folder / MODEL_FILE
    if path.exists():
        raise OutputExistsError(f"{path} is already there; choose another folder, nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    save_given(path, model, origin)
    return path
