"""The network is known from shapes, then from what the file says, then from the table; else the way out is named."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import checkpoint_filter_fn

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.inference import infer
from kcrprune.checkpoints.registry import MODULES, describe, known, table
from kcrprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.checkpoints import ways
from tests.checkpoints.outlines import outline, shapes

# one of each kind of difference; every name in the table would take a minute
NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch32_384",
    "vit_base_patch8_224",
    "vit_medium_patch16_gap_256",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_reg4_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_384",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_s3_tiny_224",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_network_is_known_from_its_shapes(name, tmp_path):
    inferred = infer(shapes(name), Evidence(), tmp_path / "file.pth")
    row = known(inferred.architecture.name)
    assert row.num_heads == known(name).num_heads
    assert inferred.architecture.arguments == {}
    assert shapes(inferred.architecture.name) == shapes(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_timm_builds(name):
    assert known(name) == describe(name, outline(name))


def test_the_table_names_only_networks_of_timm():
    assert len(table()) > 150
    registered = {name for module in MODULES for name in timm.list_models(module=module)}
    assert {row.name for row in table()} <= registered


def state(**arguments) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(ways.timm_vit(**arguments)().state_dict())


@pytest.fixture
def unsaid(tmp_path):
    """A ViT of sizes that nobody registered and heads that nobody states."""
    save_file(state(embed_dim=128, num_heads=4), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def heads(opened) -> int:
    return opened.model.blocks[0].attn.num_heads


def test_unknown_heads_are_asked_for_with_candidates(unsaid):
    with pytest.raises(CheckpointError) as caught:
        open_model(unsaid)
    sentence = str(caught.value)
    assert str(unsaid) in sentence
    assert "say --num-heads" in sentence
    assert all(f"{count} (of {128 // count} channels)" in sentence for count in (1, 2, 4, 8))


def test_heads_differ_among_known_networks(tmp_path):
    """16 and 24 heads are registered for the width 1536; the pooling tells them apart, so take it away."""
    pooled = shapes("vit_giantopt_patch16_siglip_gap_256")
    token = {"cls_token": (1, 1, 1536), "pos_embed": (1, 257, 1536), "norm.weight": (1536,), "norm.bias": (1536,)}
    with pytest.raises(CheckpointError, match=r"differ in their heads \(.* has \d+, .*; say --arch or --num-heads"):
        infer(pooled | token, Evidence(), tmp_path / "file.pth")


def test_heads_as_asked(unsaid):
    assert heads(open_model(unsaid, num_heads=4)) == 4
    with pytest.raises(ConfigError, match=r"7 heads \(as asked\) do not divide the width 128"):
        open_model(unsaid, num_heads=7)


def test_heads_of_the_metadata_are_believed_and_said(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(state(embed_dim=128, num_heads=4), path, {"num_heads": "4"})
    opened = open_model(path)
    assert heads(opened) == 4
    assert "heads 4: the file's metadata" in opened.notes
    assert heads(open_model(path, num_heads=8)) == 8


def test_arch_lends_its_name_and_the_file_its_sizes(unsaid):
    opened = open_model(unsaid, arch="vit_tiny_patch16_224", num_heads=4)
    assert opened.architecture.name == "vit_tiny_patch16_224"
    assert opened.architecture.arguments["embed_dim"] == 128
    assert any("vit_tiny_patch16_224: as asked, with the sizes of the file" in note for note in opened.notes)


def test_arch_of_the_same_width_lends_its_heads(tmp_path):
    save_file(state(embed_dim=192, num_heads=3), tmp_path / "vit.safetensors")
    assert heads(open_model(tmp_path / "vit.safetensors", arch="hf-hub:timm/vit_tiny_patch16_224.augreg_in1k")) == 3


@pytest.mark.parametrize(
    ("arch", "error", "sentence"),
    [
        ("vit_tini_patch16_224", ConfigError, r"timm has no network called 'vit_tini_patch16_224'; near it: vit_tin"),
        ("swin_tiny_patch4_window7_224", ConfigError, r"holds a VisionTransformer, but .* is a SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", ConfigError, r"is a distilled VisionTransformer"),
        ("resnet50", UnsupportedModelError, r"this ResNet has no part that kcrprune can cut"),
        ("vit_giant_patch14_dinov2", UnsupportedModelError, r"has parts that cannot be told from shapes"),
    ],
)
def test_an_arch_that_cannot_be_is_refused(unsaid, arch, error, sentence):
    with pytest.raises(error, match=sentence):
        open_model(unsaid, arch=arch)


def test_a_config_beside_the_file_that_is_another_network_is_refused_unless_arch_decides(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(state(embed_dim=192, num_heads=3, depth=12), path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "swin_tiny_patch4_window7_224"}))
    with pytest.raises(CheckpointError, match=r"but swin_tiny\w+ \(config.json\) is a SwinTransformer; --arch"):
        open_model(path)
    assert open_model(path, arch="vit_tiny_patch16_224").architecture.name == "vit_tiny_patch16_224"


def test_a_name_that_timm_does_not_know_is_told(tmp_path):
    torch.save({"state_dict": state(), "args": {"arch": "my_vit"}}, tmp_path / "vit.pth")
    notes = open_model(tmp_path / "vit.pth", num_heads=2).notes
    assert "the options of the training: my_vit, a name that timm does not know" in notes


@pytest.mark.parametrize("name", ["rope_axial_deit_small_patch16_LS", "vit_small_patch16_rope_224"])
def test_a_rotary_vit_is_no_deit_iii(tmp_path, name):
    weights = ways.official_deit3(dict(ways.timm_vit("deit3_small_patch16_224")().state_dict()))
    torch.save(weights | {"args": {"model": name}}, tmp_path / "vit.pth")
    with pytest.raises(UnsupportedModelError, match=f"{name}"):
        open_model(tmp_path / "vit.pth", num_heads=2)
    assert open_model(tmp_path / "vit.pth", num_heads=2, arch="deit3_small_patch16_224").architecture.family == "vit"


@pytest.mark.parametrize("size", [16, 48])
def test_another_image_size_is_what_timm_makes_of_it(tmp_path, size):
    """The position table is resized as by timm's own loading of the same file."""
    path = tmp_path / "vit.safetensors"
    save_file(state(), path)
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": size}
    pretrained = {"file": str(path), "input_size": (3, 32, 32), "num_classes": 5}
    expected = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=pretrained, **sizes)
    opened = open_model(path, num_heads=2, img_size=size)
    assert opened.preprocessing.input_size == (3, size, size)
    assert any("timm resizes" in note for note in opened.notes)
    assert torch.equal(opened.model.state_dict()["pos_embed"], expected.state_dict()["pos_embed"])


@pytest.mark.filterwarnings("ignore")  # timm's own, about the speed of an interpolation
def test_a_smaller_image_shrinks_a_swins_windows_as_timm_does(tmp_path):
    path = tmp_path / "swin.safetensors"
    model = ways.timm_swin()().eval()
    save_file(model.state_dict(), path)
    opened = open_model(path, img_size=16)
    tables = [name for name in model.state_dict() if name.endswith("bias_table")]
    small = ways.timm_swin(img_size=16)()
    expected = checkpoint_filter_fn(model.state_dict(), small)
    assert all(torch.allclose(opened.model.state_dict()[name], expected[name]) for name in tables)
    assert opened.model.state_dict()[tables[-1]].shape[0] == 9  # the last stage is 2 by 2


def test_an_image_size_off_the_patches_is_refused(unsaid):
    with pytest.raises(ConfigError, match="--img-size 30 is no multiple of the patch size 8"):
        open_model(unsaid, num_heads=4, img_size=30)


def test_a_backbone_gets_the_head_that_is_asked_for(tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_file({name: value for name, value in state().items() if not name.startswith("head.")}, path)
    bare = open_model(path, num_heads=2)
    assert any("no classifier in the file" in note for note in bare.notes)
    first, second = (open_model(path, num_heads=2, num_classes=7) for _ in range(2))
    assert first.model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert torch.equal(first.model.state_dict()["head.weight"], second.model.state_dict()["head.weight"])
    assert torch.equal(first.model.state_dict()["norm.weight"], bare.model.state_dict()["norm.weight"])


def test_a_head_is_not_thrown_away(unsaid):
    with pytest.raises(ConfigError, match="has a classifier for 5 classes; --num-classes 7 contradicts it"):
        open_model(unsaid, num_heads=4, num_classes=7)


def test_opening_leaves_the_random_state_alone(unsaid):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    open_model(unsaid, num_heads=4)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.weight"), "blocks.1.attn.qkv.weight is missing"),
        (lambda state: state.pop("blocks.1.norm1.weight"), "lacks 1 tensors of its network: blocks.1.norm1.weight"),
        (lambda state: state.update({"blocks.0.adapter.weight": torch.zeros(2)}), "no place for"),
        (lambda state: state.update({"blocks.1.mlp.fc1.weight": torch.zeros(8, 24)}), "pruned by other means"),
        (
            lambda state: state.update({"blocks.1.norm1.weight": torch.zeros(8)}),
            r"has the shape \(8,\), its network wants",
        ),
        (lambda state: state.update({"pos_embed": torch.zeros(1, 14, 24)}), "14 entries, which is no square image"),
        (lambda state: state.pop("pos_embed"), "no position table"),
        (lambda state: state.pop("patch_embed.proj.weight"), "no ViT or Swin"),
        (lambda state: state.update({"blocks.7.mlp.fc1.weight": torch.zeros(96, 24)}), "gapless row"),
    ],
)
def test_a_network_that_is_not_whole_is_refused(tmp_path, change, sentence):
    weights = state()
    change(weights)
    save_file(weights, tmp_path / "vit.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=sentence) as caught:
        open_model(tmp_path / "vit.safetensors", num_heads=2)
    assert "vit.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (
            "deit_small_patch16_224",
            "same shapes, perhaps another preprocessing: deit_small_patch16_224; --arch chooses",
        ),
        (
            "vit_base_patch32_clip_224",
            "activation GELU: not in the file (QuickGELU in vit_base_patch32_clip_quickgelu_224)",
        ),
    ],
)
def test_what_shapes_cannot_tell_apart_is_said(name, note, tmp_path):
    notes = infer(shapes(name), Evidence(), tmp_path / "file.pth").notes
    assert any(told.startswith(note) for told in notes), notes


def test_the_files_name_decides_between_networks_of_the_same_shapes(tmp_path):
    evidence = Evidence((Clues(resembles="deit_small_patch16_224"),))
    for name in ("deit_small_patch16_224", "vit_small_patch16_224"):
        assert infer(shapes(name), evidence, tmp_path / "x.pth").architecture.name == "deit_small_patch16_224"


@pytest.mark.parametrize("act", ["relu", ["gelu"], 7])
def test_an_unknown_activation_is_refused(tmp_path, act):
    path = tmp_path / "vit.safetensors"
    said = {"architecture": "vit_tiny_patch16_224", "arguments": {"num_heads": 2, "act_layer": act}}
    save_file(state(), path, {"timm": json.dumps(said)})
    with pytest.raises(CheckpointError, match=r"the activation .* is not one that kcrprune knows: gelu, quick_gelu"):
        open_model(path)


def test_trust_goes_to_the_first_clue():
    evidence = Evidence((Clues("a", arguments={"num_heads": 1}), Clues("b", arguments={"num_heads": 2}, norm_eps=0.1)))
    assert evidence.argument("num_heads") == (1, "a")
    assert evidence.norm_eps == (0.1, "b")
    assert evidence.argument("img_size") == (None, "")
