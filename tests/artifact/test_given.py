"""A cut network of a class of the user's own: its file, the dense one that it is cut out of again, and what is none."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kcrprune.artifact.artifact import KEY, MODEL_FILE
from kcrprune.artifact.given import ATTRIBUTE, Origin, noted, restored, save_given, save_origin
from kcrprune.errors import CheckpointError, OutputExistsError, PlanMismatchError
from kcrprune.families.contract import class_name
from kcrprune.families.foreign import hidden_units
from kcrprune.plan import ChannelPlan, Kept
from tests.artifact.test_artifact import rewritten


class Mlp(nn.Module):
    """Two linears in a row."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, hidden), nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Own(nn.Module):
    """Two of them; one is cut."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.body, self.other = nn.Sequential(Mlp(hidden), nn.Dropout(0.5)), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x + self.body(x))


class Other(Own):
    """Of the same tensors."""


RULES = {Mlp: hidden_units("up", reader="down")}
KEPT = (0, 2, 5)
PLAN = ChannelPlan(architecture=None, groups=(Kept(site="body.0", axis="mlp_hidden", width=6, channels=(KEPT,)),))
ORIGIN = Origin(class_name(Own), "body", PLAN)


def dense() -> Own:
    torch.manual_seed(0)
    return Own()


def cut() -> Own:
    """By hand, without the library, and trained on since."""
    model, rows = dense(), torch.tensor(KEPT)
    mlp: Any = model.body[0]
    mlp.up.weight, mlp.up.bias = nn.Parameter(mlp.up.weight[rows] + 1), nn.Parameter(mlp.up.bias[rows])
    mlp.down.weight = nn.Parameter(mlp.down.weight[:, rows])
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of the cut network."""
    save_given(tmp_path / MODEL_FILE, cut(), ORIGIN)
    return tmp_path / MODEL_FILE


@torch.no_grad()
@pytest.mark.parametrize("named", ["file", "folder"])
def test_what_was_saved_is_cut_out_of_a_dense_network_again(path: Path, named: str):
    model, images = dense().train(), torch.randn(5, 4)
    before = copy.deepcopy(model.state_dict())
    found = restored(model, path if named == "file" else path.parent, RULES)
    assert torch.equal(found(images), cut()(images)), "in eval mode, where nothing is dropped"
    assert not any(module.training for module in found.modules())
    assert getattr(found, ATTRIBUTE) == ORIGIN
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the given one stays"
    assert ATTRIBUTE not in vars(model)


def test_what_was_frozen_stays_frozen_and_nothing_else_is(path: Path):
    model = dense()
    model.other.requires_grad_(False)
    for of in (restored(model, path, RULES), model):
        assert {name for name, weight in of.named_parameters() if not weight.requires_grad} == {
            *("other.up.weight", "other.up.bias", "other.down.weight", "other.down.bias")
        }


def test_the_file_says_whose_it_is_and_how_it_was_cut(path: Path):
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[KEY])
    assert {name: told[name] for name in ("format", "network", "part")} == {
        "format": 3,
        "network": f"{__name__}:Own",
        "part": "body",
    }
    assert ChannelPlan.model_validate(told["plan"]) == PLAN
    assert {name: tuple(value.shape) for name, value in load_file(path).items() if name.startswith("body")} == {
        "body.0.up.weight": (3, 4),
        "body.0.up.bias": (3,),
        "body.0.down.weight": (4, 3),
        "body.0.down.bias": (4,),
    }


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Other, r"holds a .*:Own, and the network is a .*:Other"),
        (
            lambda: Own(hidden=8),
            "made for another network: mlp_hidden of 'body.0' has 1 x 6 channels there, and 1 x 8 here",
        ),
    ],
)
def test_another_network_is_refused(path: Path, network: Any, sentence: str):
    with pytest.raises(PlanMismatchError, match=sentence):
        restored(network(), path, RULES)


@pytest.mark.parametrize("change", ["missing", "more", "wider"])
def test_tensors_that_are_not_those_of_the_cut_network_are_refused_by_name(tmp_path: Path, change: str):
    model: Any = cut()
    if change == "missing":
        model.other.up.bias = None
    elif change == "more":
        model.register_buffer("stranger", torch.ones(1))
    else:
        model.other.up.bias = nn.Parameter(torch.ones(7))
    save_given(tmp_path / MODEL_FILE, model, ORIGIN)
    name = "stranger" if change == "more" else "other.up.bias"
    with pytest.raises(PlanMismatchError, match=f": {re.escape(name)} is not of one size in the file"):
        restored(dense(), tmp_path, RULES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda told: told.update(content_hash="0" * 64), "is damaged: its weights are not those that were written"),
        (lambda told: told.pop("plan"), "has damaged kcrprune metadata: Field required"),
        (lambda told: told.update(stranger=1), "has damaged kcrprune metadata: Extra inputs"),
        (lambda told: told.pop("network"), r"a network that kcrprune builds itself; kcrprune\.load opens it"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(path: Path, change: Any, sentence: str):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {sentence}|{sentence}"):
        restored(dense(), rewritten(path, change), RULES)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path):
    model: Any = cut()
    with torch.no_grad():
        model.other.up.bias[0] = torch.nan
    save_given(tmp_path / MODEL_FILE, model, ORIGIN)
    with pytest.raises(CheckpointError, match=r"infinite or no numbers .*other\.up\.bias"):
        restored(dense(), tmp_path, RULES)


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "of others"])
def test_what_save_has_not_written_is_told(tmp_path: Path, kind: str):
    path = tmp_path / "x.safetensors"
    if kind == "text":
        path.write_text("nothing")
    elif kind == "of others":
        save_file({"w": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"is no file that kcrprune\.save has written"):
        restored(dense(), tmp_path if kind == "folder" else path, RULES)


def test_a_network_that_was_restored_is_stored_once_in_a_folder_of_its_own(path: Path, tmp_path: Path):
    found = copy.deepcopy(restored(dense(), path, RULES))
    written = save_origin(found, getattr(found, ATTRIBUTE), tmp_path / "new" / "folder")
    assert written == tmp_path / "new" / "folder" / MODEL_FILE
    assert written.read_bytes() == path.read_bytes()
    with pytest.raises(OutputExistsError, match="choose another folder, nothing is overwritten"):
        save_origin(found, ORIGIN, written.parent)


def test_parameters_are_stored_in_the_type_that_is_asked_for(tmp_path: Path):
    model = noted(cut(), ORIGIN)
    model.register_buffer("scale", torch.ones(2))
    save_given(tmp_path / "half", model, ORIGIN, torch.float16)
    types = {name: value.dtype for name, value in load_file(tmp_path / "half").items()}
    assert types.pop("scale") == torch.float32, "a buffer is none"
    assert set(types.values()) == {torch.float16}
