"""What files say of their networks: whose word counts, what is believed of it, and what is passed over."""

from pathlib import Path
from typing import Any

import pytest

from kcrprune.checkpoints.clues import Clues, Evidence, as_names, as_number, as_text, believed
from kcrprune.checkpoints.locate import Located
from kcrprune.checkpoints.statements import from_module, from_options, from_preprocessor, from_timm, stated
from kcrprune.containers.contents import Contents
from kcrprune.containers.pickled_calls import Stub
from kcrprune.plan import LARGEST_SIDE

FIRST = Clues("first", arguments={"num_heads": 3}, resembles="deit", usual_size=7)
SECOND = Clues(
    *("second", "vit_a", {"num_heads": 4, "img_size": 32}, 1e-6),
    class_names=("a", "b"),
    resembles="vit",
    usual_size=8,
    called="mine",
)
THIRD = Clues("third", "vit_b", {"img_size": 64}, 1e-5, class_names=("c",), called="yours")


def test_the_most_trusted_word_counts_and_its_source_is_told():
    evidence = Evidence((FIRST, SECOND, THIRD))
    assert evidence.argument("num_heads") == (3, "first")
    assert evidence.argument("img_size") == (32, "second")
    assert evidence.argument("window_size") == (None, "")
    assert evidence.names == (("vit_a", "second"), ("vit_b", "third"))
    assert evidence.norm_eps == (1e-6, "second")
    assert evidence.usual_size == 7
    assert evidence.class_names == ("a", "b")
    assert evidence.resembles == ("deit", "vit")
    assert evidence.called == "second: mine"


def test_where_nobody_says_anything_nothing_is_known():
    evidence = Evidence((Clues("somebody"),))
    assert (evidence.names, evidence.norm_eps, evidence.usual_size, evidence.class_names) == (
        (),
        (None, ""),
        None,
        None,
    )
    assert (evidence.resembles, evidence.called, evidence.asked_size) == ((), "", None)


@pytest.mark.parametrize(
    ("arguments", "used"),
    [
        ({"num_heads": 3, "img_size": None, "depth": 9, "act_layer": "gelu"}, {"num_heads": 3, "act_layer": "gelu"}),
        ({"global_pool": "avg", "window_size": 7, "embed_dim": 3}, {"global_pool": "avg", "window_size": 7}),
        ({"num_heads": 0}, {"num_heads": 0}),  # what it means is judged against the shapes
        ([("num_heads", 3)], {}),
        (None, {}),
        ("num_heads", {}),
    ],
)
def test_only_what_shapes_cannot_tell_is_believed(arguments, used):
    assert believed(arguments) == used


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1), (LARGEST_SIDE, LARGEST_SIDE), (LARGEST_SIDE + 1, None), (0, None), (-1, None), (True, None), (3.0, None)],
)
def test_a_number_is_a_whole_one_from_1_to_the_largest_side(value, number):
    assert as_number(value) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [("a b", "a b"), ("é", "é"), ("n" * 200, "n" * 200), ("n" * 201, None), ("", None), ("a\n", None),
     ("\x1b[31m", None), (7, None), (None, None), (b"a", None)],
)  # fmt: skip
def test_a_text_is_short_and_shows(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "count", "names"),
    [
        (["a", "b"], 2, ("a", "b")),
        (("a", "b"), 2, ("a", "b")),
        ({"1": "b", "0": "a"}, 2, ("a", "b")),
        ({1: "b", 0: "a"}, 2, ("a", "b")),
        ({"0": "a", 1: "b", "2": "c"}, 2, ("a", "b")),  # of a larger table those of the head
        ({"0": "a"}, 2, None),
        ({"1": "a", "2": "b"}, 2, None),
        (["a"], 2, None),
        (["a", "b", "c"], 2, None),
        (["a", ""], 2, None),
        (["a", 2], 2, None),
        ("ab", 2, None),
        (None, 0, None),
        (["LABEL_0", "LABEL_1"], 2, None),
        (["LABEL_0", "b"], 2, ("LABEL_0", "b")),
        (["LABEL_1", "LABEL_0"], 2, ("LABEL_1", "LABEL_0")),
    ],
)
def test_class_names_are_one_for_each_output_in_order(value, count, names):
    assert as_names(value, count) == names


def module(name: str, below: dict[str, Any] | None = None, **held: Any) -> Stub:
    tables: dict[str, Any] = {"_parameters": {}, "_modules": below or {}, "_buffers": {}}
    return Stub(name, state={**tables, **held})


def test_attributes_of_a_pickled_network_say_what_its_shapes_do_not():
    norm = {"norm": module("torch.nn.modules.LayerNorm", eps=1e-6)}
    block = module("Block", {"attn": module("Attention", num_heads=3), **norm})
    decoder = module("Decoder", {"attn": module("Attention", num_heads=16)})
    patches = module("PatchEmbed", img_size=(224, 224))
    whole = {"blocks": module("S", {"0": block, "1": block}), "decoder": decoder, "patch_embed": patches, **norm}
    found = from_module(module("ViT", whole, global_pool="avg"))
    assert found.arguments == {"num_heads": 3, "global_pool": "avg", "img_size": (224, 224)}
    assert (found.norm_eps, found.source) == (1e-6, "the pickled module")


@pytest.mark.parametrize(
    ("below", "arguments", "eps"),
    [
        ({"a": module("A", num_heads=3), "b": module("A", num_heads=6)}, {}, None),  # a Swin's, by stages
        ({"a": module("A", num_attention_heads=4)}, {"num_heads": 4}, None),
        ({"a": module("A", num_heads=True)}, {}, None),
        ({"a": module("A", num_heads="3")}, {}, None),
        ({"a": module("x.LayerNorm", eps=1e-6), "b": module("x.LayerNorm", eps=1e-5)}, {}, None),
        ({"a": module("x.LayerNorm", eps=1), "b": module("x.BatchNorm", eps=1e-5)}, {}, None),
        ({"patch_embeddings": module("E", image_size=32)}, {"img_size": 32}, None),
        ({"patch_embed": module("E")}, {}, None),
        ({"a": module("A", global_pool="")}, {}, None),
    ],
)
def test_attributes_that_say_several_things_or_none_say_nothing(below, arguments, eps):
    found = from_module(module("ViT", below))
    assert (dict(found.arguments), found.norm_eps) == (arguments, eps)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ({"architecture": "vit_tiny_patch16_224.x"}, {"name": "vit_tiny_patch16_224.x"}),
        ({"arch": "vit_tiny_patch16_224"}, {"name": "vit_tiny_patch16_224"}),
        ({"architecture": "vit_tini"}, {"called": "vit_tini"}),
        ({"architecture": 7, "arch": "swin_tiny_patch4_window7_224"}, {"name": "swin_tiny_patch4_window7_224"}),
        ({}, {}),
        ({"num_heads": 3, "depth": 4}, {"arguments": {"num_heads": 3}}),
        ({"num_heads": 3, "model_args": {"num_heads": 4}}, {"arguments": {"num_heads": 4}}),
        ({"arguments": {"img_size": 64}}, {"arguments": {"img_size": 64}}),
        ({"model_args": {}, "arguments": {"img_size": 64}}, {"arguments": {"img_size": 64}}),
        (
            {"pretrained_cfg": {"input_size": [3, 64, 16], "mean": [0, 0, 0]}},
            {"usual_size": [64, 16], "preprocessing": {"input_size": [3, 64, 16], "mean": [0, 0, 0]}},
        ),
        ({"preprocessing": {"std": [1]}}, {"preprocessing": {"std": [1]}}),
        ({"pretrained_cfg": {"input_size": [64, 16]}}, {"preprocessing": {"input_size": [64, 16]}}),
        ({"pretrained_cfg": "bicubic"}, {}),
        ({"label_names": ["a", "b"], "class_names": ["c", "d"]}, {"class_names": ("a", "b")}),
        ({"class_names": ["c", "d"]}, {"class_names": ("c", "d")}),
        ({"pretrained_cfg": {"label_names": ["e", "f"]}},
         {"class_names": ("e", "f"), "preprocessing": {"label_names": ["e", "f"]}}),
        ({"label_names": ["a"]}, {}),
    ],
)  # fmt: skip
def test_a_configuration_in_timms_words(statement, expected):
    assert from_timm(statement, "config.json", 2) == Clues(source="config.json", **expected)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"args": {"model": "vit_tiny_patch16_224", "num_heads": 3}},
         {"name": "vit_tiny_patch16_224", "arguments": {"num_heads": 3}}),
        ({"args": Stub("argparse.Namespace", state={"model": "vit_tiny_patch16_224", "img_size": 32})},
         {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32}}),
        ({"args": Stub("omegaconf.DictConfig", entries={"arch": "timm/vit_tiny_patch16_224.in21k"})},
         {"name": "vit_tiny_patch16_224"}),
        ({"cfg": {"model": "mine", "arch": "vit_tiny_patch16_224"}}, {"name": "vit_tiny_patch16_224"}),
        ({"arch": "vit_tiny_patch16_224"}, {"name": "vit_tiny_patch16_224"}),
        ({"args": {"model": "mine"}, "hparams": {"model": "vit_tiny_patch16_224"}}, {"name": "vit_tiny_patch16_224"}),
        ({"args": {"model": "mine"}, "config": {"arch": "yours"}}, {"called": "mine"}),
        ({"args": {"model": "vit_tiny_patch16_224", "input_size": [3, 64, 16]}},
         {"name": "vit_tiny_patch16_224", "arguments": {"img_size": [64, 16]}}),
        ({"args": {"model": "vit_tiny_patch16_224", "input_size": [3, 64, 16], "img_size": 48,
                   "model_kwargs": {"img_size": 32}}},
         {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32}}),
        ({"args": [1], "model": {"w": 1}}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_options_of_a_training_give_a_name_that_timm_knows_or_what_it_was_called(tree, expected):
    assert from_options(tree) == Clues(source="the options of the training", **expected)


@pytest.mark.parametrize(
    ("said", "values"),
    [
        ({"image_mean": [0.1], "image_std": [0.2]}, {"mean": [0.1], "std": [0.2], "interpolation": None}),
        ({"image_mean": [0.1], "do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": None}),
        ({"do_normalize": True}, {"mean": None, "std": None, "interpolation": None}),
        ({"resample": 0}, {"mean": None, "std": None, "interpolation": "nearest"}),
        ({"resample": 9}, {"mean": None, "std": None, "interpolation": None}),
        ({"resample": "2"}, {"mean": None, "std": None, "interpolation": None}),
        ({"size": [48, 32]},
         {"mean": None, "std": None, "interpolation": None, "crop_pct": 1.0, "crop_mode": "squash"}),
        ({"size": {"height": 64, "width": 48}, "crop_size": 36, "do_center_crop": True},
         {"mean": None, "std": None, "interpolation": None, "crop_pct": 0.75}),
        ({"crop_size": 36, "do_center_crop": True}, {"mean": None, "std": None, "interpolation": None}),
        ({"size": {"shortest_edge": 0}}, {"mean": None, "std": None, "interpolation": None}),
        ({"size": 40, "do_center_crop": True},
         {"mean": None, "std": None, "interpolation": None, "crop_pct": 1.0, "crop_mode": "squash"}),
    ],
)  # fmt: skip
def test_a_preprocessor_of_hugging_face(said, values):
    assert from_preprocessor(said) == Clues(source="preprocessor_config.json", preprocessing=values)


@pytest.mark.parametrize(
    ("number", "filter_"), list(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
)
def test_a_filter_is_called_by_pillows_number(number, filter_):
    from PIL import Image

    assert from_preprocessor({"resample": number}).preprocessing["interpolation"] == filter_
    assert Image.Resampling(number).name.lower() == filter_


def located(*trail: str) -> Any:
    return Located({}, None, trail, "", ())  # type: ignore[arg-type]


def test_what_is_said_is_heard_in_the_order_of_trust():
    tree = {"model": {}, "args": {"model": "vit_tiny_patch16_224"}}
    metadata = {"kind": '{"architecture": "vit_a"}', "num_heads": "3", "note": "text"}
    config = {"architecture": "vit_b"}
    contents = Contents(
        *(Path("deit_tiny-abc.pth"), (), "PyTorch file", tree, metadata, config), preprocessor={"resample": 3}
    )
    found = stated(contents, located("model"), 5)
    assert [clue.source for clue in found] == [
        *("the file's metadata (kind)", "the file's metadata", "config.json", "the options of the training"),
        *("preprocessor_config.json", ""),
    ]
    assert found[1].arguments == {"num_heads": 3}
    assert found[-1].resembles == "deit_tiny"
    alone = stated(Contents(Path("x.y.pth"), (), "PyTorch file", {"model": {}}), located("model"), 5)
    assert [clue.resembles for clue in alone if clue.resembles] == ["x", "deit"], "as DeiT's authors publish"
    wrapped = stated(Contents(Path("x.pth"), (), "PyTorch file", {"state_dict": {}}), located("state_dict"), 5)
    assert [clue.resembles for clue in wrapped if clue.resembles] == ["x"]
