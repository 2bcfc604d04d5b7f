"""Networks measured from shapes alone, and shapes, statements and tensors that are no network's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kcrprune.checkpoints import loading
from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.loading import check_finite, check_fit, check_outline
from kcrprune.checkpoints.locate import MOST_TENSORS, locate
from kcrprune.checkpoints.registry import bare_name
from kcrprune.checkpoints.shapes import DEEPEST, classes_of, measure
from kcrprune.checkpoints.sizes import grid_of
from kcrprune.containers.contents import Contents, TensorRef
from kcrprune.errors import CheckpointError, UnsupportedModelError
from kcrprune.plan import Architecture
from tests.checkpoints.outlines import shapes
from tests.tiny import TINY

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN_SIZES = {
    "img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": 5,
}  # fmt: skip
VIT = shapes("vit_tiny_patch16_224", **SIZES)
SWIN = shapes(
    "swin_tiny_patch4_window7_224",
    **SWIN_SIZES,
)
NOTHING = Evidence()


def said(**arguments: Any) -> Evidence:
    return Evidence((Clues("config.json", arguments=arguments),))


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in VIT.items() if name not in names}


def test_sizes_are_those_that_the_network_was_built_with():
    vit, swin = measure(VIT, NOTHING), measure(SWIN, NOTHING)
    assert (vit.kind, vit.embed_dim, vit.depth, vit.hidden, vit.patch_size, vit.img_size) == ("vit", 24, 2, 96, 8, 32)
    assert (vit.num_classes, vit.in_chans, vit.num_heads, vit.reg_tokens) == (5, 3, 0, 0)
    assert (vit.class_token, vit.pos_embed, vit.final_norm, vit.fc_norm) == (True, True, True, False)
    assert (swin.kind, swin.embed_dim, swin.depth, swin.num_heads) == ("swin", 16, (2, 1), (2, 4))
    assert (swin.hidden, swin.patch_size, swin.img_size, swin.window_size) == (64, 4, 32, 4)


@pytest.mark.parametrize(
    ("change", "attribute", "value"),
    [
        ({"blocks.0.attn.q_norm.weight": (12,)}, "qk_norm", True),
        ({"blocks.0.attn.norm.weight": (24,)}, "scale_attn_norm", True),
        ({"blocks.0.mlp.norm.weight": (96,)}, "scale_mlp_norm", True),
        ({"blocks.0.ls1.gamma": (24,)}, "layer_scale", True),
        ({"blocks.0.gamma_1": (24,)}, "layer_scale", True),
        ({"norm_pre.weight": (24,)}, "pre_norm", True),
        ({"fc_norm.weight": (24,)}, "fc_norm", True),
        ({"fc_norm.weight": (24,)}, "global_pool", "avg"),
        ({"attn_pool.latent": (1, 1, 24)}, "global_pool", "map"),
        ({"attn_pool.probe": (1, 1, 24)}, "global_pool", "prr"),
        ({"reg_token": (1, 4, 24), "pos_embed": (1, 21, 24)}, "reg_tokens", 4),
        ({"reg_token": (1, 4, 24), "pos_embed": (1, 21, 24)}, "no_embed_class", False),
        ({"reg_token": (1, 4, 24), "pos_embed": (1, 16, 24)}, "no_embed_class", True),
        ({"register_tokens": (1, 4, 24)}, "no_embed_class", True),  # DINOv2's table has the class token alone
        ({"dist_token": (1, 1, 24), "pos_embed": (1, 18, 24)}, "kind", "distilled"),
        ({"patch_embed.proj.weight": (24, 192)}, "patch_size", 8),  # timm's oldest files
        ({"patch_embed.proj.weight": (24, 1, 8, 8)}, "in_chans", 1),
    ],
)
def test_traits_are_read_off_the_names_and_shapes(change: dict[str, Any], attribute: str, value: object):
    assert getattr(measure(VIT | change, NOTHING), attribute) == value
    assert getattr(measure(VIT, NOTHING), attribute) != value or attribute in ("patch_size", "no_embed_class")


@pytest.mark.parametrize(
    ("evidence", "missing", "pool"),
    [
        (NOTHING, (), "token"),
        (NOTHING, ("cls_token",), "avg"),
        (said(global_pool="max"), (), "max"),
        (said(global_pool="map"), (), "token"),  # which would need tensors of its own
        (said(global_pool="token"), ("cls_token",), "avg"),
        (said(global_pool="mean"), (), "token"),
    ],
)
def test_how_tokens_are_pooled_is_said_where_tensors_allow_it(evidence: Evidence, missing: Any, pool: str):
    found = without(*missing) | ({"pos_embed": (1, 16, 24)} if missing else {})
    assert measure(found, evidence).global_pool == pool


@pytest.mark.parametrize(
    ("name", "shape", "error", "sentence"),
    [
        (
            "patch_embed.proj.weight",
            None,
            UnsupportedModelError,
            r"the patch embedding has the shape \(\), not \(width",
        ),
        ("patch_embed.proj.weight", (24, 3, 8, 4), UnsupportedModelError, r"shape \(24, 3, 8, 4\), not \(width"),
        ("patch_embed.proj.weight", (24, 3, 0, 0), UnsupportedModelError, r"not \(width, channels, patch, patch\)"),
        (
            "blocks.1.mlp.fc1.weight",
            (48, 24),
            UnsupportedModelError,
            r"is \(48, 24\) where the first block has \(96, 24\)",
        ),
        ("blocks.1.attn.proj.weight", (24, 12), UnsupportedModelError, "pruned by other means .*kcrprune.save"),
        ("blocks.0.mlp.fc2.weight", (24, 48), UnsupportedModelError, "SwiGLU.: fc1 makes 96 channels and fc2 reads 48"),
        (
            "blocks.0.mlp.fc1.weight",
            None,
            CheckpointError,
            r"not a complete ViT or Swin: blocks\.0\.mlp\.fc1\.weight is m",
        ),
        ("blocks.1.attn.qkv.weight", (72,), CheckpointError, r"blocks\.1\.attn\.qkv\.weight has the shape \(72,\)"),
        ("blocks.3.norm1.weight", (24,), CheckpointError, f"has 3 numbered blocks or .*gapless row of up to {DEEPEST}"),
        ("blocks.123456.norm1.weight", (24,), None, ""),  # a number of six digits is none
        ("pos_embed", (17, 24), CheckpointError, r"pos_embed has the shape \(17, 24\)"),
        ("pos_embed", (1, 19, 24), UnsupportedModelError, "holds 19 entries, which is no square image of patches"),
        ("pos_embed", None, UnsupportedModelError, "its positions are rotary or relative"),
    ],
)
def test_shapes_that_are_no_networks_are_refused_with_the_reason(name: str, shape: Any, error: Any, sentence: str):
    changed = VIT | {name: shape} if shape is not None else without(name)
    if error is None:
        assert measure(changed, NOTHING) == measure(VIT, NOTHING)
        return
    with pytest.raises(error, match=sentence):
        measure(changed, NOTHING)


@pytest.mark.parametrize(("size", "found"), [(32, 32), ([16, 64], (16, 64)), (36, None), ([36, 32], None)])
def test_without_a_table_of_positions_the_image_is_what_is_said(size: Any, found: Any):
    if found is None:
        with pytest.raises(UnsupportedModelError, match="no position table"):
            measure(without("pos_embed"), said(img_size=size))
    else:
        measured = measure(without("pos_embed"), said(img_size=size))
        assert (measured.img_size, measured.no_embed_class, measured.pos_embed) == (found, False, False)


def test_outputs_are_those_of_the_last_classifier_that_is_a_matrix():
    assert classes_of({"head.weight": (5, 24)}) == 5
    assert classes_of({"head.fc.weight": (7, 24), "head.bias": (7,)}) == 7
    assert classes_of({"head.weight": (24,)}) == 0
    assert classes_of({"norm.weight": (24, 24)}) == 0


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [(224, 16, (14, 14)), ((64, 16), 4, (16, 4)), (30, 8, (3, 3)), ((7, 9), 8, (0, 1))]
)
def test_what_is_left_of_an_image_at_its_border_is_no_patch(size: Any, patch: int, grid: tuple[int, int]):
    assert grid_of(size, patch) == grid


@pytest.mark.parametrize("name", ["vit_a", "vit_a.tag", "timm/vit_a.tag", "hf-hub:timm/vit_a.tag.more", "a/b/vit_a"])
def test_the_bare_name_is_what_timm_registers(name: str):
    assert bare_name(name) == "vit_a"


X = Path("x.pth")


def test_a_tensor_that_is_missing_or_of_another_shape_is_named():
    wanted = {"a": (1,), "b": (2,)}
    check_fit(wanted, wanted | {"more": (3,)}, X)
    with pytest.raises(CheckpointError, match=r"^x\.pth lacks 2 tensors of its network: a, b$"):
        check_fit(wanted, {}, X)
    with pytest.raises(CheckpointError, match=r"^x\.pth: b has the shape \(3,\), its network wants \(2,\)$"):
        check_fit(wanted, {"a": (1,), "b": (3,)}, X)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("norm.weight", torch.tensor([1.0, torch.inf]), True),
        ("norm.weight", torch.tensor([torch.nan]), True),
        ("norm.weight", torch.tensor([1e39], dtype=torch.float64), True),  # in single precision
        ("norm.weight", torch.tensor([1e38], dtype=torch.float64), False),
        ("norm.weight", torch.tensor([2**62]), False),
        ("layers.0.blocks.1.attn_mask", torch.tensor([-torch.inf]), False),  # which is made anew
    ],
)
def test_weights_that_are_no_finite_numbers_are_named(name: str, value: torch.Tensor, refused: bool):
    if refused:
        with pytest.raises(
            CheckpointError, match=r"infinite or no numbers in single precision \(1 tensors: norm\.weight\)"
        ):
            check_finite({name: value}, X)
    else:
        check_finite({name: value}, X)


def changed(**arguments: Any) -> Architecture:
    tiny = TINY[0].architecture
    return tiny.model_copy(update={"arguments": tiny.arguments | arguments})


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        (changed(checkpoint_path="x"), "names a network or an argument that kcrprune does not know: vit_tiny"),
        (Architecture(family="vit", name="nobody's"), "does not know: nobody's"),
        (changed(img_size=0), "states an image size that cannot be: 0"),
        (changed(img_size=[32, 4096]), r"states an image size that cannot be: \[32, 4096\]"),
        (changed(depth=0), "states a depth that cannot be: 0"),
        (changed(depth=DEEPEST + 1), f"states a depth that cannot be: {DEEPEST + 1}"),
        (changed(depth=True), "states a depth that cannot be: True"),
        (changed(depths=[1] * (DEEPEST + 1)), "states a depth that cannot be"),
        (changed(depths=[2, 0]), r"states a depth that cannot be: \[2, 0\]"),
        (changed(depth=1), r"x\.pth holds tensors that its network has no place for: blocks\.1"),
        (changed(depth=3), r"x\.pth lacks 12 tensors of its network: blocks\.2"),
        (changed(num_heads=5), "states a network that timm cannot build"),
    ],
)
def test_a_statement_that_is_not_the_files_is_refused(architecture: Architecture, sentence: str):
    tiny = {name: tuple(value.shape) for name, value in TINY[0].model().state_dict().items()}
    check_outline(TINY[0].architecture, None, tiny, X)
    with pytest.raises(CheckpointError, match=sentence):
        check_outline(architecture, None, tiny, X)


def test_a_network_cut_to_a_hundredth_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "LARGEST_CUT", 0.3)
    tiny = {name: tuple(value.shape) for name, value in TINY[0].model().state_dict().items()}
    count = sum(torch.Size(shape).numel() for shape in tiny.values())
    assert count > 0.3 * 10**5
    with pytest.raises(CheckpointError, match=r"states a dense network more than 0\.3 times as large as its weights"):
        check_outline(TINY[0].architecture, None, tiny, X)


def refs(shapes: Any, prefix: str = "") -> dict[str, TensorRef]:
    return {prefix + name: TensorRef(torch.float32, shape, lambda: torch.zeros(())) for name, shape in shapes.items()}


def contents(tree: Any) -> Contents:
    return Contents(X, (), "PyTorch file", tree)


@pytest.mark.parametrize(
    ("tree", "trail", "prefix"),
    [
        (refs(VIT), (), ""),
        (refs(VIT, "module."), (), "module."),
        ({"model": refs(VIT)}, ("model",), ""),
        ({"state_dict": refs(VIT), "model_ema": refs(VIT)}, ("model_ema",), ""),
        ({"teacher": refs(VIT), "student": refs(VIT)}, ("teacher",), ""),
        ({"a": {"b": {"c": {"d": refs(VIT)}}}}, ("a", "b", "c", "d"), ""),
        ({"other": refs({"w": (1,)}), "net": refs(VIT, "backbone.")}, ("net",), "backbone."),
        (refs(VIT, "student.") | refs(VIT, "teacher."), (), "teacher."),
        (refs(VIT, "encoder.") | refs(VIT, "ema.encoder."), (), "ema.encoder."),
    ],
)
def test_of_wrappers_and_prefixes_the_best_is_opened(tree: Any, trail: tuple[str, ...], prefix: str):
    found = locate(contents(tree))
    assert (found.trail, found.prefix, found.layout.name) == (trail, prefix, "timm ViT")
    assert found.refs.keys() == VIT.keys()
    table = tree
    for key in trail:
        table = table[key]
    assert all(ref is table[prefix + name] for name, ref in found.refs.items())
    assert found.left_out == tuple(sorted(name for name in table if not name.startswith(prefix)))


def test_notes_say_where_the_weights_were_and_what_is_left_out():
    found = locate(contents({"model_ema": refs(VIT, "module.") | refs({"mask_token": (1, 1, 24)})}))
    assert found.notes(("extra",)) == (
        "weights: model_ema, the moving average (EMA) of a training checkpoint",
        "prefix 'module.' removed",
        "2 tensors that are not the network's left out: mask_token, extra",
    )
    assert locate(contents({"x": refs(VIT)})).notes(()) == ("weights: x, the entry",)
    assert locate(contents(refs(VIT))).notes(()) == ()


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({}, "x.pth is a PyTorch file without named weights"),
        ({"a": {"b": {"c": {"d": {"e": refs(VIT)}}}}}, "without named weights"),  # deeper than any wrapper
        (refs({f"w{index}": (1,) for index in range(7)}), "without named weights"),
        (refs({f"w{index}": (1,) for index in range(8)}), r"with 8 tensors \(w0, w1, w2, \.\.\.\), but no ViT or Swin"),
        (
            refs({f"w{index}": (1,) for index in range(MOST_TENSORS + 1)}),
            f"holds {MOST_TENSORS + 1} tensors, more than any",
        ),
    ],
)
def test_a_file_without_a_network_is_refused_with_what_it_holds(tree: Any, sentence: str):
    with pytest.raises(CheckpointError, match=sentence):
        locate(contents(tree))


def test_a_table_that_is_met_twice_is_looked_at_once():
    tree: dict[str, Any] = {"state_dict": refs(VIT)}
    tree["self"] = tree
    assert locate(contents(tree)).trail == ("state_dict",)
