"""Images of two sides: from tables, from what is said, resized as timm does, and refused where they contradict."""

from argparse import Namespace
from typing import Any

import pytest
import timm
import torch

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.sizes import table_size, windowed_size
from kcrprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from kcrprune.plan import as_sides, size_text
from tests.checkpoints import ways

TALL = (64, 16)


def said(size):
    return Evidence((Clues("config.json", arguments={"img_size": size}),))


@pytest.fixture(scope="module")
def tall():
    torch.manual_seed(0)
    return ways.timm_vit(img_size=TALL, patch_size=4)().eval()


@pytest.fixture(scope="module")
def tall_swin():
    """8 by 4 patches in windows of 4 by 4, then 4 by 2 in one of 4 by 2."""
    torch.manual_seed(0)
    model = ways.timm_swin(img_size=(32, 16))().eval()
    for name, table in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(table)
    return model


def saved(folder, model, **beside):
    torch.save({"state_dict": model.state_dict(), **beside}, folder / "tall.pth")
    return folder / "tall.pth"


@torch.no_grad()
@pytest.mark.parametrize(
    ("beside", "flags"),
    [
        ({"args": Namespace(model="vit_tiny_patch16_224", input_size=[3, 64, 16], img_size=None)}, {}),
        ({"args": Namespace(model="vit_tiny_patch16_224", img_size=[64, 16])}, {}),
        ({}, {"img_size": TALL}),
    ],
)
def test_a_square_count_of_patches_is_a_tall_image_where_it_is_said(tmp_path, tall, beside, flags):
    opened = open_model(saved(tmp_path, tall, **beside), num_heads=2, **flags)
    images = torch.randn(2, 3, *TALL)
    assert opened.preprocessing.input_size == (3, *TALL)
    assert torch.equal(opened.model(images), tall(images))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (32, 16), 24])
def test_a_tall_table_is_resized_from_its_own_two_sides(tmp_path, tall, size):
    """timm's set_input_size knows the grid that it comes from; (32, 32) has as many patches as (64, 16)."""
    options = {"args": Namespace(model="vit_tiny_patch16_224", img_size=[64, 16])}
    opened = open_model(saved(tmp_path, tall, **options), num_heads=2, img_size=size)
    expected: Any = ways.timm_vit(img_size=TALL, patch_size=4)()
    expected.load_state_dict(tall.state_dict())
    expected.set_input_size(size)
    assert torch.equal(opened.model.state_dict()["pos_embed"], expected.state_dict()["pos_embed"])


def test_a_square_network_is_opened_for_tall_images(tmp_path):
    square: Any = ways.timm_vit()()
    opened = open_model(saved(tmp_path, square), num_heads=2, img_size=(64, 32))
    square.set_input_size((64, 32))
    assert torch.equal(opened.model.state_dict()["pos_embed"], square.state_dict()["pos_embed"])


@torch.no_grad()
def test_windows_of_two_sides(tmp_path, tall_swin):
    path = saved(tmp_path, tall_swin)
    with pytest.raises(UnsupportedModelError, match=r"49, 21 relative positions, .* --img-size H,W"):
        open_model(path)
    images = torch.randn(2, 3, 32, 16)
    opened = open_model(path, img_size=(32, 16))
    assert opened.model(images).equal(tall_swin(images))
    assert opened.preprocessing.input_size == (3, 32, 16)


@torch.no_grad()
def test_windows_of_two_sides_become_those_of_another_image(tmp_path, tall_swin):
    options = {"args": Namespace(model="swin_tiny_patch4_window7_224", img_size=[32, 16])}
    opened = open_model(saved(tmp_path, tall_swin, **options), img_size=(16, 32))
    expected = ways.timm_swin(img_size=(16, 32))()
    for name, table in tall_swin.named_parameters():
        if name.startswith("layers.0") and "table" in name:
            assert torch.equal(opened.model.get_parameter(name), table)  # 4 by 4 in both
        elif "table" in name:
            assert opened.model.get_parameter(name).shape == expected.get_parameter(name).shape
            wide = table.view(7, 3, -1).transpose(0, 1).flatten(0, 1)
            assert not torch.equal(opened.model.get_parameter(name), table)  # equal shapes, other places
            assert not torch.equal(opened.model.get_parameter(name), wide)
            assert torch.isfinite(opened.model.get_parameter(name)).all()


@pytest.mark.parametrize(
    ("positions", "prefixes", "size", "found"),
    [
        (197, (1, 0), None, (224, 1)),
        (196, (1, 0), None, (224, 0)),
        (65, (1, 0), [64, 256], ((64, 256), 1)),
        (65, (1, 0), (80, 208), ((80, 208), 0)),  # 5 by 13, which leaves the class token out
        (64, (0,), 128, (128, 0)),
    ],
)
def test_tables_of_positions(positions, prefixes, size, found):
    assert table_size(positions, prefixes, 16, said(size) if size else Evidence()) == found


@pytest.mark.parametrize("size", ["64x16", 4096, [64, 0], [1, 2, 3], 1.5, [True, 16]])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(CheckpointError, match=r"config.json states the image size .* --img-size says it"):
        table_size(197, (1, 0), 16, said(size))


def test_a_size_that_the_table_contradicts_is_refused_unless_the_user_knows_better():
    with pytest.raises(CheckpointError, match=r"images of 112,224 pixels, which are 98 patches of 16, .* 197 entries"):
        table_size(197, (1, 0), 16, said([112, 224]))
    asked = Evidence(said([112, 224]).clues, asked_size=224)
    assert table_size(197, (1, 0), 16, asked) == (224, 1)


def test_the_input_of_the_registered_network_gives_way_to_the_table():
    assert table_size(17, (1, 0), 8, Evidence((Clues(usual_size=224),))) == (32, 1)
    assert table_size(65, (1, 0), 16, Evidence((Clues(usual_size=[64, 256]),))) == ((64, 256), 1)


@pytest.mark.parametrize(
    ("entries", "size", "found"),
    [
        ((169, 169), None, (56, 7)),
        ((49, 21), (32, 16), ((32, 16), 4)),
        ((169, 91), (64, 32), ((64, 32), 7)),  # 16 by 8 patches, then 8 by 4
        ((49, 9), 32, (32, ((4, 4), (2, 2)))),  # timm takes two numbers for height and width
        ((49, 9, 9), 32, (32, (4, 2, 2))),
    ],
)
def test_tables_of_windows(entries, size, found):
    assert windowed_size({}, 4, entries, said(size) if size else Evidence()) == found


def test_windows_that_a_stated_image_has_not_are_refused():
    with pytest.raises(CheckpointError, match="no windows of such an image"):
        windowed_size({}, 4, (49, 21), said([16, 16]))


def test_per_stage_windows_are_what_timm_builds(tmp_path):
    torch.manual_seed(0)
    model = ways.timm_swin(window_size=((4, 4), (2, 2)))().eval()
    opened = open_model(saved(tmp_path, model, args=Namespace(model="swin_tiny_patch4_window7_224", img_size=32)))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(opened.model(images), model(images))


def test_a_side_off_the_patches_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--img-size 64,30 is no multiple of the patch size 8"):
        open_model(saved(tmp_path, ways.timm_vit()()), num_heads=2, img_size=(64, 30))


@pytest.mark.parametrize(
    ("value", "size"), [(224, 224), ([224], 224), (["64", "16"], ("64", "16")), ((32, 32), 32), ([1, 2, 3], [1, 2, 3])]
)
def test_the_shortest_form_of_a_size(value, size):
    assert as_sides(value) == size


def test_a_size_is_written_as_it_is_asked_for():
    assert (size_text(224), size_text((64, 16))) == ("224", "64,16")


def test_the_registered_input_may_have_two_sides(tmp_path):
    """A registered network's tensors, at an image of two sides with as many patches."""
    model = timm.create_model("test_vit", img_size=(320, 80), num_classes=5)
    options = {"args": Namespace(model="test_vit", img_size=[320, 80])}
    assert open_model(saved(tmp_path, model, **options)).preprocessing.input_size == (3, 320, 80)
