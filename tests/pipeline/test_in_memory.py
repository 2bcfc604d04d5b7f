"""Runs on networks in memory."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kcrprune
from kcrprune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    KcrPruneError,
    OutputExistsError,
    PlanMismatchError,
    UnsupportedModelError,
)
from kcrprune.events import Note
from tests.foreign_networks import OWN_RULES, OwnMlp, OwnNetwork, foreign, images

SHORT: dict[str, Any] = {
    "target_flops": 0.85,
    "round_to": 2,
    "recover_steps": 2,
    "calibration_images": 8,
    "score_images": 8,
    "kernel_every": 2,
    "device": "cpu",
}
OWN: dict[str, Any] = {"rules": OWN_RULES, "part": "body.first"}


def loader(batches: int = 5) -> list[dict[str, Tensor]]:
    return [{"pixel_values": images(seed=seed), "labels": torch.arange(4)} for seed in range(batches)]


def loss_of_logits(returned: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(returned["logits"], batch["labels"])


def loss_of_training(returned: Any, batch: Any) -> Tensor:
    if not returned["logits"].requires_grad:
        raise KeyError("no loss in eval mode")
    return loss_of_logits(returned, batch)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return foreign("hf vit")


@pytest.fixture(scope="module")
def result(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("in memory") / "run"
    return kcrprune.compress(
        *(dense,), images=loader(), inputs="pixel_values", outputs="logits", part="vit", out=out, **SHORT
    )


def test_the_result_is_another_module_of_its_class_and_the_given_one_stays(dense, result):
    fresh = foreign("hf vit")
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert all(weight.grad is None for weight in dense.parameters())
    assert type(result.model) is type(dense)
    assert result.model is not dense
    assert result.model.state_dict().keys() == dense.state_dict().keys()
    assert result.model(pixel_values=images()).logits.shape == (4, 5)


def test_budget_and_report_are_the_parts(dense, result):
    before, after = result.comparison.before, result.comparison.after
    by_hand = 4 * (3 * 8 * 8 * 24) + 2 * (5 * (4 * 24 * 24 + 2 * 24 * 32) + 2 * 5 * 5 * 24)  # no classifier
    assert before.macs == by_hand
    assert 0.75 * by_hand < after.macs <= 0.85 * by_hand
    assert after.parameters == sum(weight.numel() for weight in result.model.vit.parameters())
    assert after.input_size == (3, 16, 16)


def test_its_distance_is_that_of_the_named_output_on_a_batch_that_is_held_out(dense, result):
    def distance(seed: int) -> float:
        with torch.no_grad():
            y, y0 = (each(pixel_values=images(seed=seed)).logits for each in (result.model, dense))
        return float(((y - y0).square().sum(1) / y0.square().sum(1)).mean())

    assert result.distances.keys() == {"logits"}
    assert any(result.distances["logits"] == pytest.approx(distance(seed), rel=1e-4) for seed in range(5))


def test_a_run_is_shown_again_where_the_same_is_asked_and_refused_where_something_else_is(dense, result):
    asked = {"images": loader(), "inputs": "pixel_values", "part": "vit", "out": result.folder, **SHORT}
    again = kcrprune.compress(dense, outputs="logits", **asked)
    assert again.comparison == result.comparison
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in result.model.state_dict().items())
    for other in ({"images": loader(4)}, {"inputs": lambda batch: batch["pixel_values"]}):
        with pytest.raises(OutputExistsError, match=r"differs in the (checkpoint|images)"):
            kcrprune.compress(dense, outputs="logits", **(asked | other))


def test_what_is_saved_is_restored(dense, result, tmp_path: Path):
    with torch.no_grad():
        next(result.model.parameters()).add_(1)
    path = kcrprune.save(result.model, tmp_path / "saved")
    restored = kcrprune.restore(dense, path)
    again = kcrprune.restore(foreign("hf vit"), kcrprune.save(restored, tmp_path / "again"))
    for model in (restored, again):
        assert torch.equal(model(images()).logits, result.model(images()).logits)
    with pytest.raises(OutputExistsError):
        kcrprune.save(restored, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"kcrprune\.restore"):
        kcrprune.load(path)
    with pytest.raises(PlanMismatchError, match=r"holds a .*ViTForImageClassification"):
        kcrprune.restore(foreign("hf clip"), path)


def test_a_file_of_another_kind_is_not_restored(finished: Path):
    with pytest.raises(CheckpointError, match=r"kcrprune\.load opens it"):
        kcrprune.restore(foreign("hf vit"), finished)


def test_every_stage_runs_on_batches_of_two_sizes_with_a_loss_and_frozen_weights():
    model = foreign("own")
    model.head.requires_grad_(False)
    mixed = [{"pixel_values": torch.randn(3, 3, side, 24), "labels": torch.arange(3)} for side in (16, 24, 16, 24, 16)]
    found: Any = kcrprune.compress(
        *(model,),
        images=mixed,
        inputs=lambda batch: batch["pixel_values"],
        outputs=("logits", "tokens"),
        loss=loss_of_logits,
        rules=OWN_RULES,
        search_steps=2,
        tighten_steps=2,
        reconstruct_epochs=1,
        axes=("mlp_hidden", "heads"),
        **SHORT,
    )
    assert found.distances.keys() == {"logits", "tokens"}
    assert torch.equal(found.model.head.weight, model.head.weight)
    assert not found.model.head.weight.requires_grad
    assert found.model.body.last.up.weight.requires_grad
    assert found.folder is None


def test_a_refit_helps_where_more_than_modules_in_a_row_lies_between_blocks(tmp_path: Path):
    asked = SHORT | {"calibration_images": 16, "recover_steps": 0}
    kcrprune.compress(
        foreign("hf swin"), images=loader(), inputs="pixel_values", outputs="logits", out=tmp_path / "run", **asked
    )
    plans = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["decisions"]["plans"]
    assert plans["held_out_distillation"]["scores"] < 0.9 * plans["before_refit"]["scores"]


def test_a_loss_of_training_alone_leaves_the_decision_to_the_distance():
    told: list[str] = []
    kcrprune.compress(
        *(foreign("own"),),
        images=loader(),
        inputs=_pixels,
        outputs="tokens",
        loss=loss_of_training,
        **OWN,
        **(SHORT | {"target_flops": 0.9}),
        listener=lambda event: told.append(event.text) if isinstance(event, Note) else None,
    )
    assert any("the loss is taken in training alone" in text for text in told)


def test_the_listing_says_what_can_be_cut_and_why_not():
    text = str(kcrprune.groups(foreign("torchvision vit")))
    assert "2 x MLPBlock: mlp_hidden (32)" in text
    assert "MultiheadAttention: its forward wants heads that fill the width of the stream" in text
    listing = kcrprune.groups(OwnNetwork(), rules={OwnMlp: OWN_RULES[OwnMlp]})
    assert {group.site for group in listing.groups} == {"body.first", "body.last"}
    assert "OwnAttention with its linears q, k, v, o; rules= takes one" in str(listing)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"rules": {}}, UnsupportedModelError, "made of .*OwnMlp"),
        ({"part": "backbone"}, ConfigError, "'backbone' is no module .* it has patches, body, head"),
        ({"part": "body"}, ConfigError, "'body' is never called"),
        ({"images": []}, DataError, "gives no images"),
        ({"images": None}, ConfigError, "needs images="),
        ({"images": [["a"]], "inputs": None}, DataError, "no tensor is among"),
        ({"outputs": "boxes"}, ConfigError, r"no output 'boxes': the network returns \{logits"),
        ({"outputs": len}, (ConfigError, UnsupportedModelError), "outputs="),
        ({"inputs": None}, DataError, "cannot be called with .*pixel_values"),
        ({"inputs": "images"}, ConfigError, "does not fit a batch"),
        (
            {"inputs": lambda batch: batch["image"]},
            ConfigError,
            r"inputs fails on \{pixel_values.*: 'image'\)",
        ),
        ({"images": [{"pixel_values": torch.full((4, 3, 16, 16), torch.nan)}]}, DataError, "no finite numbers"),
        ({"images": [*loader(2), {"pixel_values": torch.ones(4, 1, 16, 16)}]}, DataError, r"\(4, 1, 16, 16\)"),
        ({"data": "folder"}, ConfigError, "data is for networks and images in files"),
        ({"rules": OWN_RULES | {nn.Dropout: OWN_RULES[OwnMlp]}}, ConfigError, "the rule for .*Dropout finds nothing"),
        ({"loss": lambda returned, batch: batch["class"]}, ConfigError, "loss fails on .*KeyError"),
        ({"loss": lambda returned, batch: 1.0, "recover_steps": 1}, DataError, "one number as a tensor"),
        ({"target_latency": 0.7, "target_flops": 1.0}, ConfigError, "for one in memory give target_flops"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(options, error, sentence):
    asked = OWN | {"images": loader(2), "inputs": _pixels, "outputs": "logits"} | SHORT
    with pytest.raises(error, match=sentence) as caught:
        kcrprune.compress(foreign("own"), **(asked | options))
    assert isinstance(caught.value, KcrPruneError)
    assert "\n" not in str(caught.value)


def _pixels(batch: Any) -> Any:
    return batch["pixel_values"]


def test_a_network_in_half_precision_and_one_that_draws_are_refused():
    asked = OWN | {"images": loader(2), "inputs": _pixels} | SHORT
    with pytest.raises(ConfigError, match=r"bfloat16; give it in float32"):
        kcrprune.compress(copy.deepcopy(foreign("own")).bfloat16(), **asked)
    drawing = foreign("own")
    drawing.patches.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    with pytest.raises(UnsupportedModelError, match="answers otherwise each time"):
        kcrprune.compress(drawing, **asked)
