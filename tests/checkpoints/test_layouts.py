"""Every layout: the foreign library's output equals that of the opened network."""

import json

import pytest
import torch
from timm.models.swin_transformer import PatchMerging

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.layouts import LAYOUTS, openmmlab
from kcrprune.errors import UnsupportedModelError
from tests.checkpoints.foreign import FOREIGN, Foreign

pytestmark = pytest.mark.filterwarnings("ignore")  # the foreign libraries' own, when they build and save


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.label)
@torch.no_grad()
def test_opened_network_computes_what_the_foreign_one_does(foreign: Foreign, tmp_path):
    model = foreign.model()
    images = torch.randn(2, 3, foreign.size, foreign.size, generator=torch.Generator().manual_seed(1))
    opened = open_model(foreign.save(model, tmp_path), **foreign.options)
    assert opened.layout.startswith(foreign.layout + ",")
    assert_close(opened.model(images), foreign.output(model, images))


def test_every_layout_has_a_foreign_checkpoint():
    assert {layout.name for layout in LAYOUTS} == {foreign.layout for foreign in FOREIGN}


def test_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(torch.ones(2), torch.ones(2) + 1e-3)


def test_patch_merging_of_openmmlab_reads_what_unfold_makes():
    """Its own merging: unfold, norm, linear; timm's: neighbours side by side."""
    torch.manual_seed(0)
    merging = PatchMerging(6, 12)
    image = torch.randn(2, 4, 8, 6)  # (B, H, W, C)
    norm, linear = torch.nn.LayerNorm(24), torch.nn.Linear(24, 12, bias=False)
    torch.nn.init.normal_(norm.weight)
    pieces = torch.nn.functional.unfold(image.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # (B, 8, 24)
    own = {
        "stages.0.downsample.norm.weight": norm.weight.data,
        "stages.0.downsample.norm.bias": norm.bias.data,
        "stages.0.downsample.reduction.weight": linear.weight.data,
    }
    found = openmmlab.SWIN.convert(own)
    merging.load_state_dict({name.removeprefix("layers.1.downsample."): value for name, value in found.items()})
    torch.testing.assert_close(merging(image).flatten(1, 2), linear(norm(pieces)))


def test_names_of_clip_alone_do_not_tell_its_activation(tmp_path):
    foreign = next(foreign for foreign in FOREIGN if foreign.label == "OpenAI's image tower alone")
    path = foreign.save(foreign.model(), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"QuickGELU.*--arch vit_base_patch32_clip_quickgelu_224"):
        open_model(path, num_heads=4)


def test_a_norm_in_front_of_the_pooling_of_open_clip_is_asked_for(tmp_path):
    foreign = next(foreign for foreign in FOREIGN if foreign.label == "OpenCLIP's own ViT, folder")
    folder = foreign.save(foreign.model(), tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["final_ln_after_pool"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="norms stand elsewhere"):
        open_model(folder)
