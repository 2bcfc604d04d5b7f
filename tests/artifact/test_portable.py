"""What leaves for people without kcrprune computes the same there."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
import timm
import torch
from torch import nn

from kcrprune.artifact import portable
from kcrprune.artifact.artifact import open_model
from kcrprune.artifact.portable import save_for_timm, save_program, timm_arguments
from kcrprune.errors import ExportError, KcrPruneError, OutputExistsError
from kcrprune.plan import ChannelPlan, Kept, Preprocessing
from kcrprune.surgery.narrow import cut_, full_plan
from tests.tiny import TINY, Tiny, random_plan

PREPROCESSING = Preprocessing(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.875)
BY_LABEL = {tiny.label: tiny for tiny in TINY}


def uniform_plan(model: nn.Module, tiny: Tiny, share: float = 0.4) -> ChannelPlan:
    """A plan that cuts the same share of hidden units in every block."""
    plan = full_plan(model, tiny.architecture.name)
    return with_hidden(plan, lambda kept: range(1, 1 + int(share * kept.width)))


def with_hidden(plan: ChannelPlan, units: Callable[[Kept], Iterable[int]], block: str = "") -> ChannelPlan:
    """The plan with other hidden units, of all blocks or of one."""
    groups = [
        kept.model_copy(update={"channels": (tuple(units(kept)),)})
        if kept.axis == "mlp_hidden" and block in ("", kept.block)
        else kept
        for kept in plan.groups
    ]
    return plan.model_copy(update={"groups": tuple(groups)})


@pytest.mark.filterwarnings("ignore")  # torch's own, while it exports
def test_a_program_runs_with_torch_alone(tmp_path):
    tiny = BY_LABEL["deit_distilled"]
    model = tiny.model()
    cut_(model, random_plan(model, tiny.architecture.name, 1))
    save_program(tmp_path / "model.pt2", model, input_size=tiny.input_size)
    torch.save(tiny.images(5), tmp_path / "images.pt")
    program = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module(); images = torch.load(sys.argv[2]); "
        "torch.save(program(images), sys.argv[3]); assert not {'timm', 'kcrprune'} & sys.modules.keys()"
    )
    files = [str(tmp_path / name) for name in ("model.pt2", "images.pt", "output.pt")]
    subprocess.run([sys.executable, "-c", program, *files], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), model(tiny.images(5)), rtol=1e-5, atol=1e-5)
    assert b"site-packages" not in (tmp_path / "model.pt2").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_differs_is_not_kept(tmp_path, monkeypatch):
    export, plain = torch.export.export, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    def wrong(model, *arguments, **options):
        return export(nn.Sequential(model, nn.Softmax(-1)), *arguments, **options)

    monkeypatch.setattr(torch.export, "export", wrong)
    with pytest.raises(ExportError, match="differs from the model"):
        save_program(tmp_path / "model.pt2", plain, input_size=(3, 8, 8))
    assert not list(tmp_path.iterdir())


def save(folder, tiny: Tiny, plan: ChannelPlan, model: nn.Module) -> None:
    save_for_timm(
        folder,
        model,
        architecture=tiny.architecture,
        plan=plan,
        preprocessing=PREPROCESSING,
        class_names=tuple("abcde"),
    )


@torch.no_grad()
def test_timm_opens_a_network_with_thinner_mlps(tiny, tmp_path):
    model = tiny.model()
    plan = uniform_plan(model, tiny)
    cut_(model, plan)
    save(tmp_path / "folder", tiny, plan, model)
    opened = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(opened(tiny.images()), model(tiny.images()))
    assert tuple(cast(Any, opened).pretrained_cfg["mean"]) == PREPROCESSING.mean
    if tiny.label in ("hybrid", "swinv2", "eva02", "eva02_scaled", "dinov3"):
        return  # which kcrprune itself opens in registered sizes alone
    ours = open_model(tmp_path / "folder")
    assert torch.equal(ours.model(tiny.images()), model(tiny.images()))
    assert (ours.class_names, ours.preprocessing.mean) == (tuple("abcde"), PREPROCESSING.mean)


def test_a_swin_may_have_another_width_in_each_stage(tmp_path):
    tiny = BY_LABEL["swin"]
    model = tiny.model()
    plan = uniform_plan(model, tiny)
    plan = with_hidden(plan, lambda kept: range(7), "layers.1.blocks.0")
    cut_(model, plan)
    save(tmp_path / "folder", tiny, plan, model)
    opened = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(opened(tiny.images()), model(tiny.images()))


def test_what_timm_cannot_say_is_refused(tiny_vit, tmp_path):
    model = tiny_vit.model()
    for going, message in ((0, "a cut of mlp_hidden alone"), (1, r"without blocks\.0\.attn, which went as a whole")):
        with pytest.raises(ExportError, match=message):
            save(tmp_path / "folder", tiny_vit, random_plan(model, tiny_vit.architecture.name, 1, going), model)
    uneven = uniform_plan(model, tiny_vit)
    with pytest.raises(ExportError, match=r"the plan has \[38, 96\]"):
        timm_arguments(tiny_vit.architecture, with_hidden(uneven, lambda kept: range(96), "blocks.0"))
    other = replace(tiny_vit, architecture=tiny_vit.architecture.model_copy(update={"norm_eps": 1e-12}))
    with pytest.raises(ExportError, match="epsilon 1e-12"):
        save(tmp_path / "folder", other, uneven, model)
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_stays(tiny_vit, tmp_path):
    model = tiny_vit.model()
    with pytest.raises(OutputExistsError):
        save(tmp_path, tiny_vit, uniform_plan(model, tiny_vit), model)


def kept(block: str, axis: str, width: int, count: int, heads: int = 1) -> Kept:
    """What a plan keeps of a group; `count` channels of each head."""
    branch = "mlp" if axis.startswith("mlp") else "attn"
    every = tuple(range(heads))
    return Kept.model_validate(
        {"site": f"{block}.{branch}", "axis": axis, "heads": heads, "width": width, "kept_heads": every}
        | {"channels": [list(range(count))] * heads}
    )


def of_blocks(*units: int, names: str = "blocks.{}", io: int | None = 24) -> ChannelPlan:
    """A plan of blocks of 24 channels that keep so many of 96 hidden units."""
    groups = []
    for index, count in enumerate(units):
        block = names.format(index)
        groups += [kept(block, "attn_value", 12, 12, heads=2), kept(block, "mlp_hidden", 96, count)]
        groups += [kept(block, "mlp_io", io, io)] if io else []
    return ChannelPlan(architecture="x", groups=tuple(groups))


@pytest.mark.parametrize("io", [24, None])
@pytest.mark.parametrize("units", range(1, 96, 5))
def test_the_ratio_is_one_from_which_timm_computes_the_width(units: int, io: int | None):
    ratio = timm_arguments(BY_LABEL["vit"].architecture, of_blocks(units, units, io=io))["mlp_ratio"]
    assert isinstance(ratio, float)
    assert int(24 * ratio) == units


def test_what_is_not_cut_needs_no_argument():
    architecture = BY_LABEL["vit"].architecture
    for plan in (None, of_blocks(96, 96)):
        assert timm_arguments(architecture, plan) == architecture.arguments
        assert timm_arguments(architecture, plan) is not architecture.arguments


def test_stages_of_a_swin_have_a_ratio_each_and_other_networks_one_in_all():
    names = ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0")
    groups = of_blocks(48, 48, 24).groups
    renamed = [
        group.model_copy(update={"site": group.site.replace(f"blocks.{index}", names[index])})
        for index in range(3)
        for group in groups
        if group.block == f"blocks.{index}"
    ]
    plan = ChannelPlan(architecture="x", groups=tuple(renamed))
    assert timm_arguments(BY_LABEL["swin"].architecture, plan)["mlp_ratio"] == [2.0, 1.0]
    with pytest.raises(ExportError, match=r"one MLP ratio for all stages of this network; export a \.pt2 or ONNX"):
        timm_arguments(BY_LABEL["vit"].architecture, plan)


def test_a_folder_for_timm_holds_two_files_that_say_what_was_asked_for(tiny_vit, tmp_path):
    model, plan = tiny_vit.model(), uniform_plan(tiny_vit.model(), tiny_vit)
    cut_(model, plan)
    folder = tmp_path / "new" / "below"
    options = {"architecture": tiny_vit.architecture, "preprocessing": PREPROCESSING}
    save_for_timm(folder, model, plan=plan, class_names=None, **options)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["below"]
    told = json.loads((folder / "config.json").read_text("utf-8"))
    assert (told["architecture"], told["num_classes"], told["label_names"]) == ("vit_tiny_patch16_224", 5, None)
    stated = PREPROCESSING.model_dump(mode="json")
    assert told["pretrained_cfg"] == {name: value for name, value in stated.items() if name != "source"}
    assert told["model_args"]["embed_dim"] == 24
    with pytest.raises(OutputExistsError):
        save_for_timm(folder, model, plan=plan, class_names=None, **options)


def test_a_folder_that_could_not_be_filled_is_not_there(tiny_vit, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = tiny_vit.model()
    monkeypatch.setattr(portable, "save_file", full)
    with pytest.raises(KcrPruneError, match=r"No space left on device"):
        save(tmp_path / "folder", tiny_vit, uniform_plan(model, tiny_vit), model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factor", "same"), [(1.0, True), (1 + 0.9e-5, True), (1 - 0.9e-5, True), (1 + 1.2e-5, False), (torch.nan, False)]
)
def test_a_program_may_differ_by_a_hundred_thousandth_of_the_largest_output(factor: float, same: bool):
    class Largest(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            counted.append(len(images))
            return torch.tensor([[-100.0, 1.0]], dtype=torch.float64).expand(len(images), 2)

    counted: list[int] = []
    model = Largest()

    def program(images: torch.Tensor) -> torch.Tensor:
        wrong = model(images).clone()
        wrong[-1, 0] *= factor
        return wrong

    if same:
        portable._compare(program, model, (3, 8, 8))
        assert counted == [1, 1, 3, 3], "of other batch sizes than the one that was exported"
    else:
        with pytest.raises(ExportError, match=r"differs from the model by (1\.2e-05|nan) for 1 images"):
            portable._compare(program, model, (3, 8, 8))
