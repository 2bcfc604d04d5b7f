"""A network that was loaded and trained on goes back into an artifact."""

import copy

import pytest
import torch
from torch import nn

import kcrprune
from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.errors import ConfigError, DivergedError, OutputExistsError
from kcrprune.plan import Preprocessing
from kcrprune.surgery.narrow import cut_
from tests.tiny import Tiny, random_plan

RECORD = {"dense_macs": 1_000_000, "dense_digest": "d", "accuracy": {"images": 5, "top1": 1.0}, "kernel": None}


@pytest.fixture
def cut(tiny_vit: Tiny, tmp_path):
    """The artifact of a cut network."""
    model = tiny_vit.model()
    plan = random_plan(model, tiny_vit.architecture.name, 1)
    save_model(
        tmp_path / "cut.safetensors",
        cut_(model, plan),
        architecture=tiny_vit.architecture,
        plan=plan,
        preprocessing=Preprocessing(input_size=tiny_vit.input_size, mean=(0.5,) * 3, std=(0.25,) * 3),
        class_names=tuple("abcde"),
        record=RECORD,
    )
    return tmp_path / "cut.safetensors"


def trained(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """One large step."""
    model.train()
    model(images).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-2).step()
    return model.eval()


WAYS = {
    "itself": lambda model: model,
    "a deep copy": copy.deepcopy,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_was_trained_on_comes_back(way: str, cut, tiny_vit: Tiny, tmp_path):
    images = tiny_vit.images()
    with torch.enable_grad():
        model = trained(kcrprune.load(cut), images)
    expected = model(images)
    path = kcrprune.save(WAYS[way](model), tmp_path / "mine")  # type: ignore[operator]
    assert path == tmp_path / "mine" / "model.safetensors"
    opened, before = open_model(tmp_path / "mine"), open_model(cut)
    assert torch.equal(opened.model(images), expected)
    assert not torch.allclose(before.model(images), expected)
    assert (opened.plan, opened.preprocessing, opened.class_names) == (
        before.plan,
        before.preprocessing,
        before.class_names,
    )
    assert opened.record == {"dense_macs": 1_000_000, "dense_digest": "d"}, "figures of the old weights are gone"


@torch.no_grad()
def test_a_classifier_may_have_become_another_and_weights_halves(cut, tiny_vit: Tiny, tmp_path):
    model = kcrprune.load(cut)
    model.reset_classifier(3)  # type: ignore[operator]
    size = kcrprune.save(model, tmp_path / "three", class_names=["x", "y", "z"]).stat().st_size
    opened = open_model(tmp_path / "three")
    assert (opened.class_count, opened.class_names) == (3, ("x", "y", "z"))
    assert torch.equal(opened.model(tiny_vit.images()), model(tiny_vit.images()))
    assert kcrprune.save(copy.deepcopy(model).half(), tmp_path / "half").stat().st_size < 0.8 * size
    assert open_model(tmp_path / "half").class_names is None
    model.reset_classifier(0)  # type: ignore[operator]
    kcrprune.save(model, tmp_path / "bare")
    assert open_model(tmp_path / "bare").outputs == "features"


def test_what_cannot_be_stored_is_refused(cut, tiny_vit: Tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"VisionTransformer does not come from kcrprune\.load"):
        kcrprune.save(tiny_vit.model(), tmp_path / "mine")
    model = kcrprune.load(cut)
    with pytest.raises(ConfigError, match="2 class names are given, and the network has 5 classes"):
        kcrprune.save(model, tmp_path / "mine", class_names=["a", "b"])
    changed = copy.deepcopy(model)
    changed.norm = nn.Identity()
    with pytest.raises(ConfigError, match=r"lacks 2 tensors of its network: norm\.bias.* not what kcrprune\.load gave"):
        kcrprune.save(changed, tmp_path / "mine")
    with torch.no_grad():
        model.get_parameter("norm.bias")[0] = torch.nan
    with pytest.raises(DivergedError, match=r"norm\.bias holds nan or infinite values"):
        kcrprune.save(model, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    kcrprune.save(kcrprune.load(cut), tmp_path / "mine")
    with pytest.raises(OutputExistsError):
        kcrprune.save(kcrprune.load(cut), tmp_path / "mine")


def test_load_takes_what_a_file_does_not_tell_and_nothing_else(tiny_vit: Tiny, tmp_path):
    torch.save(tiny_vit.model().state_dict(), tmp_path / "dense.pth")
    model = kcrprune.load(tmp_path / "dense.pth", num_heads=2)
    with torch.no_grad():
        assert torch.allclose(model(tiny_vit.images()), tiny_vit.model()(tiny_vit.images()), atol=1e-6)
    kcrprune.save(model, tmp_path / "mine")
    assert open_model(tmp_path / "mine").plan is None
    with pytest.raises(ConfigError, match="'lr' does not say how a network is read"):
        kcrprune.load(tmp_path / "dense.pth", lr=0.1)
