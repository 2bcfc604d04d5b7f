"""Files of registered sizes are known by the table alone, and what the table cannot decide is left to others."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints import inference, registry
from kcrprune.checkpoints.clues import Clues, Evidence
from kcrprune.checkpoints.inference import infer
from kcrprune.checkpoints.signatures import behaviour, is_registered, table, tensors, with_tensors
from kcrprune.containers.contents import shapes_of
from kcrprune.errors import CheckpointError
from kcrprune.families import build
from tests.checkpoints.outlines import outline, shapes

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = tuple(table())[::30]
PATH = Path("file.pth")
ALONE = "vit_base_patch16_reg4_gap_256"  # no other network has its tensors
TWINS = ("deit_small_patch16_224", "vit_small_patch16_224")  # differ in their preprocessing


@pytest.fixture
def unmeasured(monkeypatch):
    """No specialist reads sizes."""

    def measure(*_):
        raise CheckpointError("a specialist was asked")

    monkeypatch.setattr(inference, "measure", measure)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_timm_builds(name):
    assert table()[name] == (tensors(shapes(name)), behaviour(outline(name)))


def test_every_network_whose_sizes_are_known_is_in_the_table():
    assert {row.name for row in registry.table()} <= table().keys()
    assert all(is_registered(name) and timm.is_model(name) for name in table())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's own, to developers
def test_the_tables_are_those_of_the_installed_timm():
    if f"with timm {timm.__version__};" not in (ROOT / "docs" / "networks.md").read_text():
        pytest.skip("the tables are those of another timm")
    made = runpy.run_path(str(ROOT / "docs" / "networks.py"))["tables"]()
    assert {file: file.read_text() for file in made} == made


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"num_classes": 0}])
@pytest.mark.parametrize("name", [ALONE, "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.usefixtures("unmeasured")
def test_registered_sizes_are_known_without_a_specialist(name, arguments):
    found = infer(shapes(name, **arguments), Evidence(), PATH)
    assert (found.architecture.name, found.architecture.arguments) == (name, arguments)
    assert shapes_of(build(found.architecture, device="meta").state_dict()) == shapes(name, **arguments)
    registered = timm.get_pretrained_cfg(name)
    assert registered is not None
    assert (found.in_chans, found.img_size, found.img_size) == registered.input_size


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.usefixtures("unmeasured")
def test_of_networks_with_equal_tensors_the_files_word_decides(name):
    found = infer(shapes(name), Evidence((Clues("config.json", name=f"timm/{name}.in1k"),)), PATH)
    assert found.architecture.name == name
    assert found.notes[0] == f"architecture {name}: config.json, and its tensors"


@pytest.mark.parametrize("clues", [Clues(), Clues("config.json", name="swin_tiny_patch4_window7_224")])
@pytest.mark.usefixtures("unmeasured")
def test_without_a_word_the_table_answers_nothing(clues):
    with pytest.raises(CheckpointError, match=rf"has the tensors of .*{' and of '.join(TWINS)}.*; say --arch"):
        infer(shapes(TWINS[0]), Evidence((clues,)), PATH)


@pytest.mark.parametrize(
    ("name", "stated", "arguments"),
    [
        (ALONE, {"img_size": 256, "global_pool": "avg", "act_layer": "gelu", "num_heads": 12}, {}),
        (ALONE, {"num_heads": 16}, {"num_heads": 16}),
        ("swin_tiny_patch4_window7_224", {"img_size": 448}, {"img_size": 448}),
        ("swin_tiny_patch4_window7_224", {"img_size": [224, 224]}, {}),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_what_a_file_states_of_its_use_is_kept_where_it_differs(name, stated, arguments):
    found = infer(shapes(name), Evidence((Clues("config.json", arguments=stated, norm_eps=1e-6),)), PATH)
    assert found.architecture.arguments == arguments
    assert [note for note in found.notes if note.endswith(": config.json")] == (
        [f"{key} {value}: config.json" for key, value in arguments.items()]
        + (["layer norms use epsilon 1e-06: config.json"] if name.startswith("swin") else [])
    )
    assert found.architecture.norm_eps == (1e-6 if name.startswith("swin") else None)


@pytest.mark.parametrize(
    "stated", [{"img_size": 512}, {"global_pool": "map"}, {"num_heads": "many"}, {"act_layer": ["gelu"]}]
)
@pytest.mark.usefixtures("unmeasured")
def test_a_statement_that_the_tensors_contradict_is_for_a_specialist(stated):
    with pytest.raises(CheckpointError, match="does not tell how it uses them"):
        infer(shapes(ALONE), Evidence((Clues("config.json", arguments=stated),)), PATH)


@pytest.mark.usefixtures("unmeasured")
def test_a_whole_file_is_opened_by_the_table(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    save_file(dict(model.state_dict()), tmp_path / "file.safetensors")
    opened = open_model(tmp_path / "file.safetensors", arch="vit_tiny_patch16_224")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(opened.model(images), model(images))
    assert opened.layout == "timm, safetensors file"


def test_a_classifier_is_no_part_of_a_signature():
    assert ALONE in with_tensors(shapes(ALONE, num_classes=3))
    assert not with_tensors(shapes(ALONE, depth=11))
