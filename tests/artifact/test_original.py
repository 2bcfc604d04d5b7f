"""A cut network goes back into the file that it was made of: the file opens again and computes the same."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.artifact.artifact import open_model
from kcrprune.artifact.original import GONE, KEPT, STRANGE, _around, _cut, put_back
from kcrprune.cli.app import run
from kcrprune.errors import CheckpointError, ExportError, OutputExistsError
from kcrprune.plan import AXES
from kcrprune.surgery.narrow import cut_
from tests.checkpoints import ways
from tests.checkpoints.foreign import FOREIGN, TWO, Foreign
from tests.tiny import nested_plan, random_plan

pytestmark = pytest.mark.filterwarnings("ignore")  # the foreign libraries' own, when they build and save

NAMES = (
    *("mmdet Swin", "Swin of the authors' detectors", "mmseg ViT", "mmpretrain ViT", "official DeiT III"),
    *("Hugging Face Swin of a detector", "Hugging Face ViT, shards", "OpenAI CLIP", "timm training checkpoint"),
)
KINDS = {foreign.label: foreign for foreign in FOREIGN if foreign.label in NAMES}


def cut(path, axes=AXES, going=0.0, **options):
    """What is in a file, cut at random and its weights moved, as a run leaves it."""
    opened = open_model(path, **options)
    plan = random_plan(opened.model, opened.architecture.name, seed=3, going=going)
    kept = tuple(entry if entry.axis in axes else _all_of(entry) for entry in plan.groups)
    plan = plan.model_copy(update={"groups": kept})
    model = cut_(copy.deepcopy(opened.model), plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return replace(opened, model=model, plan=plan)


def _all_of(entry):
    every = tuple(range(entry.width))
    heads = tuple(range(entry.heads))
    return entry.model_copy(update={"kept_heads": heads, "channels": (every,) * entry.heads})


@pytest.mark.parametrize("label", NAMES)
@torch.no_grad()
def test_in_its_old_shapes_the_file_opens_again_and_computes_what_the_cut_network_does(label: str, tmp_path):
    foreign: Foreign = KINDS[label]
    path = foreign.save(foreign.model(), tmp_path)
    opened = cut(path, going=0.5, **foreign.options)
    assert opened.plan
    assert opened.plan.gone
    with pytest.raises(ExportError, match="went as a whole"):
        put_back(opened, path, None, tmp_path / "out", keep_shapes=False)
    written = put_back(opened, path, None, tmp_path / "out", keep_shapes=True)
    if path.is_dir():
        shutil.copy(path / "config.json", written.path.with_name("config.json"))
    options = (
        {"num_heads": 2} if label == "timm training checkpoint" else foreign.options
    )  # the arguments are no plain data
    again: Any = open_model(written.path, **options).model
    expected: Any = opened.model
    images = torch.randn(2, 3, foreign.size, foreign.size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.forward_features(images), expected.forward_features(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_channels_of_the_stream_come_back_in_their_old_order(tmp_path):
    path = ways.torch_file()(ways.timm_vit()(), tmp_path)
    opened = open_model(path, **TWO)
    plan = nested_plan(opened.model, opened.architecture.name, seed=6, going=0)
    assert plan.stream
    opened = replace(opened, model=cut_(copy.deepcopy(opened.model), plan), plan=plan)
    written = put_back(opened, path, None, tmp_path / "out", keep_shapes=True)
    again: Any = open_model(written.path, **TWO).model
    expected: Any = opened.model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ours = again.forward_features(images)[..., list(plan.stream[0])]
    torch.testing.assert_close(ours, expected.forward_features(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again(images), expected(images), rtol=1e-4, atol=1e-4)
    small = torch.load(put_back(opened, path, tmp_path / "small.pth", tmp_path, keep_shapes=False).path)
    hidden = {kept.site: kept.kept_width for kept in plan.groups if kept.axis == "mlp_hidden"}
    assert any(width < 96 for width in hidden.values())
    for site, width in hidden.items():
        assert small[f"{site}.fc2.weight"].shape == (24, width), "zeros where rows were cut"
    torch.testing.assert_close(small["blocks.1.norm2.weight"], again.blocks[1].norm2.weight)


def test_a_detector_gets_its_narrow_backbone_and_keeps_everything_else(tmp_path):
    state = ways.openmmlab_swin(norms=True)(dict(ways.timm_swin()().state_dict()))
    neck = torch.arange(3.0)
    state["state_dict"]["neck.lateral_convs.0.conv.bias"] = neck
    meta = {"CLASSES": ("cat", "dog"), "epoch": 12}
    torch.save(state | {"meta": meta, "optimizer": {"state": {0: {"exp_avg": neck}}}}, tmp_path / "detector.pth")
    opened = cut(tmp_path / "detector.pth", axes={"mlp_hidden"})
    written = put_back(opened, tmp_path / "detector.pth", None, tmp_path, keep_shapes=False)
    assert written.path.name == "detector-cut.pth"
    assert written.left_out == ("optimizer",)
    found = torch.load(written.path)
    assert found["meta"] == meta
    old, new = state["state_dict"], found["state_dict"]
    assert list(new) == list(old)
    assert opened.plan
    hidden = {kept.site: kept.channels[0] for kept in opened.plan.groups if kept.axis == "mlp_hidden"}
    assert any(len(channels) < 64 for channels in hidden.values())
    for name, value in old.items():
        where = name.removeprefix("backbone.").replace("stages.", "layers.").replace(".ffn.layers.", ".mlp.")
        site, _, part = where.partition(".mlp.")
        rows = torch.tensor(hidden[site + ".mlp"]) if part else None
        kept = value if rows is None else value[rows] if part.startswith("0.") else value
        kept = kept[:, rows] if part == "1.weight" else kept
        trained = name.startswith("backbone.") and not name.startswith("backbone.norm0")
        torch.testing.assert_close(new[name], kept * 1.5 if trained else kept, msg=name)


def test_the_loop_of_the_page_takes_a_narrow_file_in(tmp_path):
    """Linears of a network that knows of no cut become as narrow as the file's."""
    model = ways.timm_vit(num_classes=0)()
    torch.save(
        {"state_dict": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "d.pth"
    )
    opened = cut(tmp_path / "d.pth", axes={"mlp_hidden"}, **TWO)
    state = torch.load(put_back(opened, tmp_path / "d.pth", None, tmp_path, keep_shapes=False).path)["state_dict"]
    detector = nn.ModuleDict({"backbone": ways.timm_vit(num_classes=0)()})
    for name, module in list(detector.named_modules()):
        if isinstance(module, nn.Linear):
            rows, columns = state[f"{name}.weight"].shape
            detector.set_submodule(name, nn.Linear(columns, rows, bias=module.bias is not None))
    detector.load_state_dict(state)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(detector["backbone"].eval()(images), opened.model(images))


def test_narrow_attention_has_rows_of_its_own(tmp_path):
    foreign = KINDS["mmseg ViT"]
    path = foreign.save(foreign.model(), tmp_path)
    opened = cut(path, axes={"attn_query", "attn_value", "heads"}, **foreign.options)
    new = torch.load(put_back(opened, path, tmp_path / "x.pth", tmp_path, keep_shapes=False).path)["state_dict"]
    for index in range(2):
        name = f"backbone.layers.{index}.attn.attn.in_proj_weight"
        torch.testing.assert_close(new[name], opened.model.get_parameter(f"blocks.{index}.attn.qkv.weight"))


def test_what_cannot_be_put_back_is_refused_and_nothing_is_written(tmp_path):
    model = ways.timm_vit()()
    path, other = ways.torch_file()(model, tmp_path), tmp_path / "other.pth"
    torch.save(ways.timm_vit()().state_dict(), other)
    opened = cut(path, **TWO)
    with pytest.raises(CheckpointError, match="is not the file that"):
        put_back(opened, other, None, tmp_path, keep_shapes=True)
    with pytest.raises(OutputExistsError):
        put_back(opened, path, other, tmp_path, keep_shapes=True)
    with pytest.raises(ExportError, match=r"pos_embed was resized.*--img-size"):
        put_back(cut(path, img_size=48, **TWO), path, None, tmp_path, keep_shapes=True)
    whole = ways.whole(model, tmp_path)
    with pytest.raises(ExportError, match="pickled whole"):
        put_back(cut(whole), whole, None, tmp_path, keep_shapes=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pth", "other.pth", "whole.pth"]


def test_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    foreign = KINDS["mmseg ViT"]
    state = ways.mmseg_vit(dict(foreign.model().state_dict()))
    torch.save(state | {"optimizer": {"step": torch.ones(1)}}, "segmenter.pth")
    words = ["--generated-images", "8", "--calibration-images", "4", "--score-images", "4", "--batch-size", "4"]
    words += ["--recipe", "no-train", "--workers", "0", "--device", "cpu", "--num-heads", "2", "--out", "run"]
    assert run(["compress", "segmenter.pth", "--target-flops", "0.8", *words]) == 0
    assert run(["export", "run", "--into", "segmenter.pth"]) == 0
    told = capsys.readouterr()
    assert str(Path("run/segmenter-cut.pth")) in told.out
    assert "left out of segmenter.pth, as no plain data or training's: optimizer" in told.err
    assert run(["export", "run", "--into", "segmenter.pth", "--keep-shapes", "--out", "zeros.pth"]) == 0
    old, new = (torch.load(name)["state_dict"] for name in ("segmenter.pth", "zeros.pth"))
    assert {name: value.shape for name, value in old.items()} == {name: value.shape for name, value in new.items()}
    assert run(["export", "run", "--into", "segmenter.pth", "--format", "timm"]) == 2


GRID = torch.arange(1.0, 7.0).reshape(2, 3)


def states(*rows: str) -> torch.Tensor:
    """Of each element: s(trange), k(ept) or g(one)."""
    letters = {"s": STRANGE, "k": KEPT, "g": GONE}
    return torch.tensor([[letters[letter] for letter in row] for row in rows], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (states("kkk", "kkk"), -GRID),
        (states("sss", "sss"), GRID),
        (states("sks", "kss"), torch.tensor([[1.0, -2, 3], [-4, 5, 6]])),
        (states("kgk", "kgs"), torch.tensor([[-1.0, -3], [-4, 6]])),
        (states("ggg", "ksk"), torch.tensor([[-4.0, 5, -6]])),
        (states("ggg", "kgs"), torch.tensor([[-4.0, 6]])),
        (states("ggg", "ggg"), torch.empty(0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_of_a_tensor_of_the_file_what_is_kept_is_new_and_what_is_gone_leaves_no_gap(state, expected, dtype):
    old, before = GRID.to(dtype), GRID.to(dtype)
    new = _cut(old, -GRID.double(), state, "w")
    assert (new.dtype, new.tolist()) == (dtype, expected.tolist())
    assert torch.equal(old, before)


def test_a_vector_loses_places_and_what_is_no_tensor_any_more_is_refused():
    state = torch.tensor([KEPT, GONE, STRANGE], dtype=torch.uint8)
    assert _cut(torch.ones(3), torch.zeros(3).double(), state, "b").tolist() == [0, 1]
    with pytest.raises(ExportError, match=r"^what is left of w is no tensor$"):
        _cut(GRID, GRID.double(), states("gkk", "kkg"), "w")
    large = GRID.double() * 1e5
    with pytest.raises(
        ExportError, match=r"^w holds values that torch\.float16, its type in the file, is too small for"
    ):
        _cut(GRID.half(), large, states("kkk", "kkk"), "w")
    assert _cut(GRID.half(), large, states("sss", "sss"), "w").tolist() == GRID.tolist()


def test_what_is_plain_stays_around_the_table_and_the_rest_is_named():
    table, new, stub = {"w": object(), "n": 3}, {"w": torch.ones(2)}, object()
    tree = {
        "epoch": 3,
        "meta": {"classes": ["cat", b"dog"], "at": (1, 2.5, None), "none": {}},
        "hook": stub,
        "deep": {"list": [1, [stub]]},
        "state": {"table": table, "other": {"x": stub}, "\x1b[31m": stub},
        3: stub,
    }
    kept, lost = _around(tree, ("state", "table"), new)
    assert kept == {"epoch": 3, "meta": tree["meta"], "state": {"table": {"w": new["w"], "n": 3}}}
    assert kept["state"]["table"]["w"] is new["w"]
    assert lost == ["hook", "deep", "3", "other", r"\x1b[31m"]
    assert tree["state"]["table"]["w"] is not new["w"], "the file's own table is as it was"
    assert _around(table, (), new) == ({"w": new["w"], "n": 3}, [])
