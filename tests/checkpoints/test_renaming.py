"""What converters of layouts share, and what libraries' own configurations say, on tensors of a few numbers."""

import math

import pytest
import torch

from kcrprune.checkpoints.clues import Clues
from kcrprune.checkpoints.layouts import clip, torchvision
from kcrprune.checkpoints.layouts.huggingface import _clues
from kcrprune.checkpoints.layouts.renaming import join_qkv, last_norm, move_downsampling, rename, with_norm
from kcrprune.errors import UnsupportedModelError


def named(*names: str, **sizes: int) -> dict[str, torch.Tensor]:
    """Tensors that are told apart by their values."""
    return {name: torch.full((sizes.get(name, 2),), float(index)) for index, name in enumerate(names)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_rule_is_tried_on_every_name_in_order():
    tensors = named("a.x", "b.x", "c")
    found = rename(tensors, ((r"^a\.", "b."), (r"\.x$", ".y"), (r"^c$", "d")))
    assert same(found, {"b.y": tensors["b.x"], "d": tensors["c"]})
    assert rename(tensors, ()) == tensors


def test_q_k_and_v_are_joined_where_all_three_are_there():
    whole = [f"blocks.0.attn.{part}.{kind}" for kind in ("weight", "bias") for part in "vqk"]
    tensors = named(*whole, "blocks.1.attn.q.weight", "attn.q.weight", "blocks.0.q.bias", "x.attn.q.gain")
    found = join_qkv(tensors)
    for kind in ("weight", "bias"):
        rows = [tensors[f"blocks.0.attn.{part}.{kind}"] for part in "qkv"]
        assert torch.equal(found.pop(f"blocks.0.attn.qkv.{kind}"), torch.cat(rows))
    assert same(found, {name: value for name, value in tensors.items() if name not in whole})


def test_patch_merging_moves_to_the_start_of_the_next_stage():
    tensors = named(
        "layers.0.downsample.norm.weight", "layers.9.downsample.x", "layers.0.blocks.0.x", "x.layers.0.downsample"
    )
    assert list(move_downsampling(tensors)) == [
        *("layers.1.downsample.norm.weight", "layers.10.downsample.x", "layers.0.blocks.0.x", "x.layers.0.downsample")
    ]


@pytest.mark.parametrize("pattern", ["norm{}", "hidden_states_norms.stage{}"])
def test_of_several_norms_behind_stages_the_last_is_the_networks(pattern: str):
    norms = [pattern.format(stage) for stage in (0, 2, 3)]
    names = [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
    last = {"layers.0.blocks.0.norm2.weight": 2, "layers.3.blocks.0.norm2.weight": 4}
    tensors = named(*names, *last, **last, **{f"{norms[-1]}.weight": 4, f"{norms[-1]}.bias": 4})
    found = last_norm(tensors)
    assert torch.equal(found["norm.weight"], tensors[f"{norms[-1]}.weight"])
    assert torch.equal(found["norm.bias"], tensors[f"{norms[-1]}.bias"])
    assert f"{norms[0]}.weight" in found
    narrow = tensors | {f"{norms[-1]}.weight": torch.ones(3)}
    assert last_norm(narrow) is narrow, "the last stage is not handed out"
    own = tensors | named("norm.weight")
    assert last_norm(own) is own


def test_a_swin_without_a_last_norm_gets_one_that_changes_no_scale():
    tensors = named(
        "layers.0.blocks.0.norm2.weight", "layers.1.blocks.0.norm2.weight", **{"layers.1.blocks.0.norm2.weight": 5}
    )
    found, told = with_norm(tensors)
    assert (found["norm.weight"].tolist(), found["norm.bias"].tolist()) == ([1.0] * 5, [0.0] * 5)
    assert told == ("no norm behind the last block in the file: one with weights 1 stands there",)
    assert with_norm(found) == (found, ())
    assert with_norm(vit := named("blocks.0.norm2.weight")) == (vit, ())


WIDTH = {"patch_embed.proj.weight": (768, 3, 16, 16)}
PREPARED = clip.PREPARED


def test_openais_own_code_has_heads_of_64_channels_and_quick_gelu():
    found = clip._published({}, WIDTH)
    assert (found.arguments, found.norm_eps) == ({"num_heads": 12, "act_layer": "quick_gelu"}, 1e-5)
    assert found.preprocessing == PREPARED
    assert clip._published({}, {"patch_embed.proj.weight": (32, 3, 8, 8)}).arguments["num_heads"] == 1
    assert clip._published({}, {}).arguments["num_heads"] == 1


@pytest.mark.parametrize(
    ("vision", "model", "prepared", "arguments", "changes"),
    [
        ({}, {}, {}, {"act_layer": "gelu", "num_heads": 12}, {}),
        ({"head_width": 96}, {"quick_gelu": True}, {}, {"act_layer": "quick_gelu", "num_heads": 8}, {}),
        ({"head_width": 1000}, {}, {}, {"act_layer": "gelu", "num_heads": 1}, {}),
        ({"head_width": "wide"}, {}, {}, {"act_layer": "gelu"}, {}),
        ({"pool_type": "avg"}, {}, {}, {"act_layer": "gelu", "num_heads": 12, "global_pool": "avg"}, {}),
        ({"global_average_pool": True}, {}, {}, {"act_layer": "gelu", "num_heads": 12, "global_pool": "avg"}, {}),
        ({"pool_type": "tok"}, {}, {}, {"act_layer": "gelu", "num_heads": 12}, {}),
        ({}, {}, {"mean": [0.5] * 3, "std": None}, {"act_layer": "gelu", "num_heads": 12}, {"mean": [0.5] * 3}),
        ({}, {}, {"resize_mode": "squash"}, {"act_layer": "gelu", "num_heads": 12}, {"crop_mode": "squash"}),
        ({}, {}, {"resize_mode": "longest"}, {"act_layer": "gelu", "num_heads": 12}, {"crop_mode": "border"}),
        ({}, {}, {"resize_mode": "other"}, {"act_layer": "gelu", "num_heads": 12}, {"crop_mode": None}),
    ],
)
def test_open_clips_configuration_is_read_for_the_image_tower(vision, model, prepared, arguments, changes):
    config = {"model_cfg": {"vision_cfg": {"width": 768} | vision} | model, "preprocess_cfg": prepared}
    assert clip._configured(config, WIDTH) == Clues(
        *("open_clip_config.json", None, arguments, 1e-5), preprocessing=PREPARED | {"crop_mode": "center"} | changes
    )


@pytest.mark.parametrize("config", [{}, {"model_cfg": 7}, {"model_cfg": {"vision_cfg": {"width": 512}}}])
def test_a_configuration_of_another_tower_says_nothing(config):
    assert clip._configured(config, WIDTH) == Clues("OpenCLIP's default", norm_eps=1e-5, preprocessing=PREPARED)


@pytest.mark.parametrize("key", ["final_ln_after_pool", "input_patchnorm"])
def test_norms_that_stand_elsewhere_are_refused(key):
    with pytest.raises(UnsupportedModelError, match="its norms stand elsewhere than in timm's network"):
        clip._configured({"model_cfg": {"vision_cfg": {"width": 768, key: True}}}, WIDTH)


def test_the_projection_of_clip_is_the_head_and_has_no_bias():
    tensors = {"class_embedding": torch.ones(4), "positional_embedding": torch.ones(5, 4), "proj": torch.rand(4, 7)}
    tensors |= {"input_resolution": torch.tensor(32), "ln_post.weight": torch.ones(4)}
    found = clip._convert(tensors)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "cls_token": (1, 1, 4),
        "pos_embed": (1, 5, 4),
        "norm.weight": (4,),
        "head.weight": (7, 4),
        "head.bias": (7,),
    }
    assert torch.equal(found["head.weight"].T, tensors["proj"])
    assert not found["head.bias"].any()
    assert "head.weight" not in clip._convert({name: value for name, value in tensors.items() if name != "proj"})


@pytest.mark.parametrize(
    ("positions", "interpolation", "crop"),
    [
        (None, "bilinear", 0.875),
        (197, "bilinear", 0.875),
        (257, "bilinear", 0.875),
        (258, "bicubic", 1.0),
        (577, "bicubic", 1.0),
    ],
)
def test_torchvisions_vits_of_large_images_are_not_cropped(positions, interpolation, crop):
    found = torchvision._vit_clues({}, {"pos_embed": (1, positions, 8)} if positions else {})
    assert (found.preprocessing["interpolation"], found.preprocessing["crop_pct"]) == (interpolation, crop)
    assert (found.source, found.preprocessing["mean"]) == ("torchvision's recipe", [0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("name", "width", "depths"),
    [("swin_t", 96, (2, 2, 6, 2)), ("swin_s", 96, (2, 2, 18, 2)), ("swin_b", 128, (2, 2, 18, 2))],
)
def test_torchvisions_swins_are_cropped_as_its_weights_say(name, width, depths):
    from torchvision.models import get_model_weights

    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (width, 3, 4, 4)}
    for stage, depth in enumerate(depths):
        shapes |= {f"layers.{stage}.blocks.{block}.norm1.weight": (1,) for block in reversed(range(depth))}
    transform = next(iter(get_model_weights(name))).transforms()
    found = torchvision._swin_clues({}, shapes).preprocessing
    assert found["crop_pct"] == round(transform.crop_size[0] / transform.resize_size[0], 4)
    assert (found["mean"], found["std"]) == (transform.mean, transform.std)
    assert found["interpolation"] == transform.interpolation.value
    assert torchvision._swin_clues({}, shapes | {"layers.0.blocks.9.x": (1,)}) == Clues(), "of none of its networks"


HF = {"patch_embed.proj.weight": (24, 3, 8, 8), "head.weight": (2, 24)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 24}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"embed_dim": 24, "hidden_act": "gelu"}, Clues("config.json", None, {"act_layer": "gelu"}, 1e-12)),
        ({"hidden_size": 48}, Clues("Hugging Face's default", None, {"act_layer": "relu"}, 1e-12)),
        ({}, Clues("Hugging Face's default", None, {"act_layer": "relu"}, 1e-12)),
        ({"vision_config": {"hidden_size": 24, "image_size": 32}},
         Clues("config.json", None, {"act_layer": "relu", "img_size": 32}, 1e-12)),
        ({"vision_config": 7, "hidden_size": 24}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "num_attention_heads": 3},
         Clues("config.json", None, {"act_layer": "relu", "num_heads": 3}, 1e-12)),
        ({"hidden_size": 24, "num_attention_heads": [2, 4]}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "layer_norm_eps": 1e-6}, Clues("config.json", None, {"act_layer": "relu"}, 1e-6)),
        ({"hidden_size": 24, "layer_norm_eps": 1}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "layer_norm_eps": 1.0}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "layer_norm_eps": 0.0}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "layer_norm_eps": math.nan}, Clues("config.json", None, {"act_layer": "relu"}, 1e-12)),
        ({"hidden_size": 24, "id2label": {"0": "a", "1": "b"}},
         Clues("config.json", None, {"act_layer": "relu"}, 1e-12, class_names=("a", "b"))),
        ({"hidden_size": 24, "id2label": {"0": "a", "1": "b", "2": "c"}},
         Clues("config.json", None, {"act_layer": "relu"}, 1e-12, class_names=("a", "b"))),
    ],
)  # fmt: skip
def test_a_configuration_of_hugging_face_is_believed_where_its_width_is_the_files(config, expected):
    assert _clues(1e-12, "relu")(config, HF) == expected
