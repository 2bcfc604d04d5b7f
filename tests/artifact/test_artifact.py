"""The artifact: what was saved is what is opened, and nothing else is."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kcrprune.artifact.artifact import KEY, open_model, save_model
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
