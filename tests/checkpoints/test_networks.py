"""The table of networks says what the rules find, and inspect prints it; files of every kind of network open."""

import json
import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kcrprune.checkpoints.dense import open_dense
from kcrprune.checkpoints.layouts.refused import REFUSED
from kcrprune.checkpoints.networks import networks
from kcrprune.checkpoints.signatures import is_registered
from kcrprune.cli import commands
from kcrprune.config import NETWORK
from kcrprune.errors import ConfigError, UnsupportedModelError
from tests.checkpoints.outlines import outline

ROOT = Path(__file__).resolve().parents[2]
MADE = runpy.run_path(str(ROOT / "docs" / "networks.py"))
TABLE = {network.name: network for network in networks()}
SAMPLE = (  # one a class of branch, of few blocks
    "vit_tiny_patch16_224", "test_vit_relpos", "vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "crossvit_tiny_240", "tnt_s_patch16_224",
    "convit_tiny", "volo_d1_224", "nest_tiny", "davit_tiny", "gcvit_xxtiny", "sam2_hiera_tiny", "samvit_base_patch16",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "vitamin_small_224",
    "naflexvit_base_patch16_siglip", "qwen3_vit_88m", "gemma4_vit_167m", "vit_base_patch16_xp_224", "resnet18",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_the_rules_find(name):
    if not timm.is_model(name):
        pytest.skip("this timm does not have it")
    axes, whole = MADE["parts_of"](outline(name))
    assert (TABLE[name].axes, bool(TABLE[name].refused)) == (axes, not axes)
    assert TABLE[name].whole == (whole if axes else {})


def test_a_floor_is_that_of_the_registered_size():
    assert MADE["support_of"]("test_vit", MADE["outline"]("test_vit")) == TABLE["test_vit"]


def test_every_name_is_cut_or_refused_with_a_reason():
    for network in TABLE.values():
        assert bool(network.axes) != bool(network.refused)
        assert (network.floor is not None) == bool(network.axes)
        assert is_registered(network.name) or network.refused


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_what_shapes_do_not_tell_can_be_cut_where_the_sentence_says_so(refused):
    if refused.like:
        assert TABLE[refused.like].axes
        assert refused.like in refused.sentence()
    else:
        assert refused.name == "ResNet"
        assert TABLE["resnet50"].refused


def test_the_readme_counts_what_the_table_does():
    figures = MADE["figures"](TABLE.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{figures['transformers_cut']} of the {figures['transformers']} transformers of timm" in readme
    assert f"{figures['complete']} of them in all" in readme


@pytest.mark.parametrize("form", ["table", "json", "markdown"])
def test_inspect_lists_them(form, capsys):
    commands.inspect(file=None, list_=True, form=form, **dict.fromkeys(NETWORK))
    printed = capsys.readouterr().out
    if form == "json":
        assert [row["name"] for row in json.loads(printed)] == list(TABLE)
    else:
        assert "cait_xxs24_224" in printed
        assert "no attention, and no part with a rule" in printed


def test_inspect_wants_a_file_or_the_list():
    for file, list_ in ((None, False), (Path("x.pth"), True)):
        with pytest.raises(ConfigError, match="--list"):
            commands.inspect(file=file, list_=list_, **dict.fromkeys(NETWORK))


@pytest.mark.parametrize(
    ("name", "prefix", "classes"),
    [("test_vit_relpos", "module.", 7), ("test_vit3", "backbone.", 5), ("mobilevit_xxs", "model.", 7)],
)
def test_a_registered_network_opens_whatever_its_kind(name, prefix, classes, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes).eval()
    save_file({f"{prefix}{key}": value for key, value in model.state_dict().items()}, tmp_path / "file.safetensors")
    opened = open_dense(tmp_path / "file.safetensors")
    images = torch.randn(1, *opened.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(opened.model(images), model(images))
    assert (opened.architecture.name, opened.class_count) == (name, classes)


def test_a_network_without_a_part_that_can_be_cut_is_refused(tmp_path):
    save_file(dict(timm.create_model("test_resnet").state_dict()), tmp_path / "file.safetensors")
    with pytest.raises(UnsupportedModelError):
        open_dense(tmp_path / "file.safetensors")
