"""The artifact: what was saved is what is opened, and nothing else is."""

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kcrprune.artifact import artifact
from kcrprune.artifact.artifact import KEY, content_hash, is_artifact, open_model, rounded_, save_model, write_tensors
from kcrprune.errors import CheckpointError, ConfigError, KcrPruneError, OutputExistsError
from kcrprune.plan import Preprocessing
from kcrprune.surgery.narrow import cut_
from tests.tiny import Tiny, random_plan

PREPROCESSING = Preprocessing(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.875)


def save(path: Path, tiny: Tiny, *, seed: int | None = 1) -> torch.nn.Module:
    """A tiny network, cut by a random plan unless there is no seed, saved; it is returned."""
    model = tiny.model()
    plan = None if seed is None else random_plan(model, tiny.architecture.name, seed)
    if plan is not None:
        cut_(model, plan)
    save_model(
        path,
        model,
        architecture=tiny.architecture,
        plan=plan,
        preprocessing=PREPROCESSING.model_copy(update={"input_size": tiny.input_size}),
        class_names=("a", "b", "c", "d", "e"),
        record={"seed": 1, "nested": {"loss": 0.5}},
    )
    return model


def rewritten(path: Path, change) -> Path:
    """The same file with another contract; its weights stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    contract = json.loads(header["__metadata__"][KEY])
    change(contract)
    header["__metadata__"][KEY] = json.dumps(contract)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


@pytest.mark.parametrize("seed", [None, 1])
@torch.no_grad()
def test_round_trip(tiny, seed, tmp_path):
    model = save(tmp_path / "model.safetensors", tiny, seed=seed)
    opened = open_model(tmp_path / "model.safetensors")
    assert torch.equal(opened.model(tiny.images()), model(tiny.images()))
    assert opened.architecture == tiny.architecture
    assert opened.preprocessing == PREPROCESSING.model_copy(update={"input_size": tiny.input_size})
    assert opened.class_names == ("a", "b", "c", "d", "e")
    assert opened.record == {"seed": 1, "nested": {"loss": 0.5}}
    assert (opened.plan is None) == (seed is None)
    assert opened.model.state_dict().keys() == model.state_dict().keys()


def test_a_run_folder_is_its_artifact(tiny_vit, tmp_path):
    save(tmp_path / "model.safetensors", tiny_vit)
    assert open_model(tmp_path).layout == "kcrprune artifact"


def test_equal_networks_and_records_give_equal_bytes(tiny, tmp_path):
    save(tmp_path / "a", tiny)
    save(tmp_path / "b", tiny)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_is_one_key_of_canonical_json(tiny_vit, tmp_path):
    save(tmp_path / "model.safetensors", tiny_vit)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == [KEY]
    parsed = json.loads(metadata[KEY])
    assert metadata[KEY] == json.dumps(parsed, sort_keys=True, separators=(",", ":"))


def test_an_existing_file_stays(tiny_vit, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="nothing is overwritten"):
        save(path, tiny_vit)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("place", [-1, -1000, -5000])
def test_one_flipped_bit_in_the_weights_is_noticed(tiny_vit, tmp_path, place):
    path = tmp_path / "model.safetensors"
    save(path, tiny_vit)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="content hash differs"):
        open_model(path)


def test_a_newer_format_says_how_to_read_it(tiny_vit, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, tiny_vit)
    with pytest.raises(CheckpointError, match=r"format 99 and this kcrprune reads up to 2; .*pip install -U"):
        open_model(rewritten(path, lambda contract: contract.update(format=99)))


@pytest.mark.parametrize(
    "change",
    [
        lambda contract: contract.pop("format"),
        lambda contract: contract.pop("architecture"),
        lambda contract: contract.update(surprise=1),
        lambda contract: contract["architecture"].update(name="hf-hub:somebody/model"),
        lambda contract: contract["architecture"].update(name="resnet50"),
        lambda contract: contract["architecture"]["arguments"].update(checkpoint_path="/etc/passwd"),
        lambda contract: contract["architecture"]["arguments"].update(depth=10**9),
        lambda contract: contract["architecture"]["arguments"].update(embed_dim=10**6),
        lambda contract: contract["architecture"]["arguments"].update(mlp_ratio=1e9),
        lambda contract: contract["architecture"]["arguments"].update(num_heads=7),
        lambda contract: contract["architecture"]["arguments"].update(act_layer="os.system"),
        lambda contract: contract["architecture"]["arguments"].update(img_size=[10**6, 10**6]),
        lambda contract: contract["plan"]["groups"].pop(),
        lambda contract: contract.update(plan=None),
        lambda contract: contract["preprocessing"].update(mean="grey"),
        lambda contract: contract.update(content_hash="0" * 64),
    ],
)
def test_a_false_contract_is_refused(tiny_vit, tmp_path, change):
    path = tmp_path / "model.safetensors"
    save(path, tiny_vit)
    with pytest.raises(KcrPruneError, match=r"model\.safetensors|plan"):
        open_model(rewritten(path, change))


def test_the_network_of_an_artifact_is_not_to_be_argued_with(tiny_vit, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, tiny_vit)
    with pytest.raises(ConfigError, match=r"leave --arch, --num-heads out"):
        open_model(path, arch="vit_tiny_patch16_224", num_heads=2, mean=None)


def test_preprocessing_of_an_artifact_may_be_overridden(tiny_vit, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, tiny_vit)
    opened = open_model(path, mean=(0.5, 0.5, 0.5), crop_pct=None)
    assert opened.preprocessing.mean == (0.5, 0.5, 0.5)
    assert opened.preprocessing.crop_pct == PREPROCESSING.crop_pct
    assert opened.preprocessing.source.startswith("--mean")


@pytest.mark.parametrize("label", ["vit", "swin"])
@torch.no_grad()
def test_an_artifact_of_format_1_opens_to_the_same_outputs(label: str):
    """Both were written before plans listed groups; they are never made anew."""
    folder = Path(__file__).parent / "format_1"
    wanted = load_file(folder / f"{label}.output.safetensors")
    opened = open_model(folder / f"{label}.safetensors")
    assert opened.plan is not None
    assert not opened.plan.is_all
    torch.testing.assert_close(opened.model(wanted["images"]), wanted["output"], rtol=1e-5, atol=1e-6)


def normed() -> nn.Module:
    """Parameters, and buffers of two types that are none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_parameters_are_rounded_to_what_a_type_can_hold_and_buffers_stay(dtype):
    model, exact = normed(), normed()
    model[1].running_mean.fill_(1 / 3)  # type: ignore[index,union-attr]
    assert rounded_(model, dtype) is model
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.get_parameter(name).to(dtype).float())
    assert torch.equal(model.get_buffer("1.running_mean"), torch.full((4,), 1 / 3))


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65520.0, False), (-1e5, False), (float("nan"), True)])
def test_a_value_that_a_type_is_too_small_for_is_named(value, fits):
    model = normed()
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = value
    if fits:
        assert not rounded_(model, torch.float16).get_parameter("0.bias").isinf().any()
        return
    with pytest.raises(
        ConfigError, match=r"^0\.bias holds values that torch\.float16 is too small for; choose --dtype b"
    ):
        rounded_(model, torch.float16)
    rounded_(model, torch.bfloat16)


def test_parameters_alone_are_stored_in_another_type_and_what_is_stored_is_hashed(tmp_path):
    model, hashed = normed(), []

    def contract(tensors):
        hashed.append({name: value.dtype for name, value in tensors.items()})
        return PREPROCESSING

    write_tensors(tmp_path / "half", model, contract, torch.float16)
    found = load_file(tmp_path / "half")
    assert hashed == [{name: value.dtype for name, value in found.items()}]
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value.half() if name in dict(model.named_parameters()) else value)
    write_tensors(tmp_path / "whole", model, contract, None)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(tmp_path / "whole").items())


def test_the_hash_is_that_of_names_types_shapes_and_bytes_in_the_order_of_names():
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(True)}
    expected = sha256(b'["a","torch.bool",[]]' + b"\x01")
    expected.update(b'["b","torch.float32",[3,2]]' + struct.pack("<6f", 0, 3, 1, 4, 2, 5))
    assert content_hash(tensors) == content_hash(dict(reversed(tensors.items()))) == expected.hexdigest()
    others: list[dict[str, torch.Tensor]] = [
        tensors | {"b": tensors["b"].reshape(2, 3)},
        tensors | {"b": tensors["b"].view(torch.int32)},
        {"b": tensors["b"], "c": tensors["a"]},
        tensors | {"a": torch.tensor(False)},
    ]
    assert len({content_hash(other) for other in [tensors, *others]}) == 5


def test_a_file_or_a_folder_of_ours_is_told_from_others(tiny_vit, tmp_path):
    save(tmp_path / "model.safetensors", tiny_vit)
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    assert [is_artifact(tmp_path / name) for name in ("", "model.safetensors", "link")] == [True] * 3
    assert [is_artifact(tmp_path / name) for name in ("other.safetensors", "text", "empty", "absent")] == [False] * 4


def test_what_the_system_or_the_library_says_is_one_sentence(tiny_vit, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"n+ cannot be read \(File name too long\)"):
        open_model(tmp_path / ("n" * 300))

    def full(*_: Any) -> None:
        raise SafetensorError("no room")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(KcrPruneError, match=r"^cannot write .*model\.safetensors: no room$"):
        save(tmp_path / "model.safetensors", tiny_vit)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The artifact of a tiny ViT, cut; nobody writes into it."""
    from tests.tiny import TINY

    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    save(path, TINY[0])
    return path


@pytest.mark.parametrize("version", [None, True, 0, -1, 1.5, "2", [2]])
def test_a_format_is_a_number_from_1(written, tmp_path, version):
    path = tmp_path / "model.safetensors"
    path.write_bytes(written.read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors states no format version in its kcrprune metadata"):
        open_model(rewritten(path, lambda contract: contract.update(format=version)))
    assert open_model(rewritten(path, lambda contract: contract.update(format=1))).plan


def test_a_network_of_the_users_own_is_to_be_restored(written, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(written.read_bytes())
    told = rewritten(path, lambda contract: contract.update(network="mine:Net", format=3))
    with pytest.raises(
        CheckpointError, match=r"holds a mine:Net, .* kcrprune\.restore\(dense, path\) cuts a dense one"
    ):
        open_model(told)


@pytest.mark.parametrize(
    ("stated", "asked", "outputs", "names"),
    [
        (None, None, "classes", True),  # of before: as the last layer says
        ("features", None, "features", False),
        ("classes", "features", "features", False),
        ("features", "classes", "classes", True),
    ],
)
def test_outputs_are_what_is_asked_else_what_is_stated_and_classes_alone_have_names(
    written, tmp_path, stated, asked, outputs, names
):
    path = tmp_path / "model.safetensors"
    path.write_bytes(written.read_bytes())
    rewritten(path, lambda contract: contract.update(outputs=stated))
    opened = open_model(path, outputs=asked)
    assert (opened.outputs, opened.class_names) == (outputs, ("a", "b", "c", "d", "e") if names else None)


@pytest.mark.parametrize(
    ("asked", "told"), [(64, 64), ((64, 64), 64), ((32, 48), [32, 48]), (32, None), ((32, 32), None), (None, None)]
)
def test_another_size_becomes_an_argument_of_the_network_and_a_note(written, tiny_vit, asked, told):
    opened = open_model(written, img_size=asked)
    assert opened.architecture.arguments == tiny_vit.architecture.arguments | ({"img_size": told} if told else {})
    assert opened.digest == sha256(written.read_bytes()).hexdigest()
    assert opened.file_bytes == written.stat().st_size
    assert opened.path == written
    assert len(opened.notes) == (2 if told else 1)
    if told:
        text = "32,48" if told == [32, 48] else "64"
        assert opened.notes[1] == f"image size {text} in place of 32: as asked; tables of positions are resized"
        assert opened.record == {}, "no figure is of this size"
    else:
        assert opened.record == {"seed": 1, "nested": {"loss": 0.5}}
