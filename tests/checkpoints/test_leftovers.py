"""Every tensor of a file has its place or is on the list of what networks do without; weights are finite numbers."""

import pytest
import torch
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.checkpoints.leftovers import needed_beside, needed_inside
from kcrprune.errors import CheckpointError
from kcrprune.plan import Preprocessing
from tests.checkpoints import ways
from tests.checkpoints.foreign import timm_features

ONE = torch.zeros(1)


@pytest.fixture(scope="module")
def vit():
    return dict(ways.timm_vit()().state_dict())


@pytest.fixture(scope="module")
def swin():
    return dict(ways.timm_swin()().state_dict())


def opened(folder, weights, **flags):
    path = folder / "file.pth"
    torch.save(weights, path)
    return open_model(path, **flags)


@pytest.mark.parametrize(
    "extra",
    [
        "prompt_tokens",  # visual prompts
        "pre_logits.fc.weight",  # which timm's conversion drops by itself
        "extra\x1b[31m",
        "temporal_embed",
        "blocks.0.attn.relative_bias",
        "blocks.1.mask_token",  # the list speaks of the network's own level
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_without_a_place_is_named(tmp_path, vit, extra, dtype):
    weights = {name: value.to(dtype) for name, value in (vit | {extra: ONE}).items()}
    with pytest.raises(CheckpointError, match="no place for") as caught:
        opened(tmp_path, {"model": weights}, num_heads=2)
    assert repr(extra)[1:-1] in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_position_table_of_a_swin_is_not_left_out(tmp_path, swin):
    official = ways.official_swin(swin)["model"] | {"absolute_pos_embed": torch.zeros(1, 64, 16)}
    with pytest.raises(CheckpointError, match=r"no place for \(absolute_pos_embed\)"):
        opened(tmp_path, {"model": official})


def test_a_swin_that_is_stored_without_its_last_norm_gets_one(tmp_path):
    model = ways.timm_swin()().eval()  # whose norm has weights 1 still
    official = ways.official_swin(dict(model.state_dict()))["model"]
    official = {name: value for name, value in official.items() if not name.startswith("head.")}
    weights = {f"backbone.bottom_up.{name}": value for name, value in official.items() if not name.startswith("norm.")}
    beside = {"backbone.bottom_up.norm0.weight": torch.ones(16), "backbone.fpn_lateral2.bias": ONE, "pixel_mean": ONE}
    found = opened(tmp_path, {"model": weights | beside})
    assert any("no norm behind the last block" in note for note in found.notes)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(found.model(images), timm_features(model, images))


def test_what_is_no_part_of_the_network_is_left_out_and_named(tmp_path, vit):
    inside = vit | {"mask_token": ONE, "blocks.0.attn.total_ops": ONE}
    weights = {f"net.{name}": value for name, value in inside.items()} | {"criterion.weight": ONE, "fc.bias": ONE}
    notes = opened(tmp_path, weights, num_heads=2).notes
    assert (
        "4 tensors that are not the network's left out: criterion.weight, fc.bias, blocks.0.attn.total_ops, ..."
    ) in notes


def test_what_lies_beside_the_network_may_belong_to_it(tmp_path, vit):
    inside = {f"enc.vit.{name}": value for name, value in vit.items()}
    with pytest.raises(CheckpointError, match=r"\(enc\.prompt_embeddings\)"):
        opened(tmp_path, inside | {"enc.prompt_embeddings": ONE}, num_heads=2)


@pytest.mark.parametrize(
    ("name", "prefix", "needed"),
    [
        ("visual.head.mlp.fc1.weight", "visual.trunk.", False),
        ("transformer.resblocks.0.ln_1.weight", "visual.", False),
        ("transformer.resblocks.0.ln_1.weight", "", True),  # nothing says that it is another tower
        ("decode_head.conv_seg.weight", "backbone.", False),
        ("model.text_model.embeddings.weight", "model.vision_model.", False),
        ("model.prompt_learner.ctx", "model.vision_model.", True),
        ("net2.blocks.0.attn.qkv.weight", "net1.", True),  # which of two networks is meant, nobody says
        ("proposal_generator.rpn.conv.weight", "backbone.bottom_up.", False),  # of a detector, which reads a backbone
        ("pixel_mean", "backbone.bottom_up.", False),
        ("backbone.prompt_tokens", "backbone.bottom_up.", True),
        ("b.backbone.blocks.0.attn.qkv.weight", "a.backbone.", True),
        ("criterion", "", False),
        ("absolute_pos_embed", "", True),
    ],
)
def test_words_of_what_lies_beside(name, prefix, needed):
    assert needed_beside([name], prefix) == ((name,) if needed else ())


def test_copies_that_another_is_preferred_to_are_left_out():
    name = "module.base.blocks.0.attn.qkv.weight"
    assert needed_beside([name], "module.ema_net.") == (name,)
    assert needed_beside([name], "module.ema_net.", copies=["module.base."]) == ()


def test_buffers_are_made_anew():
    assert needed_inside(["layers.0.blocks.1.attn_mask", "layers.0.x"]) == ("layers.0.x",)


@pytest.mark.parametrize("names", [("x.lora_A.default.weight", "x.lora_B.default.weight"), ("x.base_layer.weight",)])
@pytest.mark.parametrize("alone", [True, False])
def test_adapters_are_to_be_merged(tmp_path, vit, names, alone):
    found = {f"base_model.model.{index}.{name}": ONE for name in names for index in range(8)}
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        opened(tmp_path, found if alone else vit | found, num_heads=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("name", ["head.bias", "blocks.1.mlp.fc1.weight"])
def test_weights_are_finite_in_single_precision(tmp_path, vit, name, value):
    wrong = vit[name].double()
    wrong.view(-1)[1] = value
    with pytest.raises(CheckpointError, match=f"infinite or no numbers .*{name}"):
        opened(tmp_path, vit | {name: wrong}, num_heads=2)


def test_a_buffer_may_be_infinite(tmp_path, swin):
    masked = swin | {"layers.0.blocks.1.attn_mask": torch.full((4, 16, 16), float("-inf"))}
    assert opened(tmp_path, masked).architecture.name.startswith("swin")


def test_an_artifact_of_no_numbers_is_named(tmp_path, tiny_vit):
    model = tiny_vit.model()
    model.get_parameter("norm.weight").data[0] = float("nan")
    preprocessing = Preprocessing(input_size=tiny_vit.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    path = tmp_path / "m.safetensors"
    save_model(
        path,
        model,
        architecture=tiny_vit.architecture,
        plan=None,
        preprocessing=preprocessing,
        class_names=None,
        record={},
    )
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        open_model(path)


def test_a_key_of_q_without_those_of_k_and_v_is_not_lost(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    weights = dict(transformers.ViTModel(config).state_dict())
    bias = [name for name in weights if name.endswith(("k_proj.bias", "key.bias"))]
    save_file({name: value for name, value in weights.items() if name not in bias}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"attn\.q\.bias"):
        open_model(tmp_path / "x.safetensors", num_heads=4)
