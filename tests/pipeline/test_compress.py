"""The whole path on tiny networks: what a run leaves behind, and that it can be repeated and loaded elsewhere."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

import kcrprune
from kcrprune import pipeline
from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.config import RunConfig, load_config
from kcrprune.errors import BudgetError, CheckpointError, ConfigError, DataError, OutputExistsError
from kcrprune.events import Event, Note, StageStarted, StepDone, ignore
from kcrprune.measure.bench import Bench
from kcrprune.measure.macs import count_macs
from kcrprune.plan import Axis, ChannelPlan, Outputs, Preprocessing
from kcrprune.run import timed
from kcrprune.run.selecting import Compared
from tests.tiny import TINY, Tiny, relative_error

SHORT = RunConfig(
    target_flops=0.8,
    axes=("mlp_io", "mlp_hidden", "attn_value", "heads"),
    search_steps=3,
    recover_steps=3,
    batch_size=8,
    generated_images=48,
    calibration_images=24,
    score_images=24,
    workers=0,
    device="cpu",
    snapshot_minutes=1e-9,
    bench=False,
)


def save(tiny: Tiny, path: Path, model: torch.nn.Module | None = None, outputs: Outputs | None = None) -> Path:
    preprocessing = Preprocessing(input_size=tiny.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(
        path,
        tiny.model() if model is None else model,
        architecture=tiny.architecture,
        plan=None,
        preprocessing=preprocessing,
        class_names=None,
        record={},
        outputs=outputs,
    )
    return path


@pytest.fixture
def checkpoint(tiny_vit: Tiny, tmp_path: Path) -> Path:
    return save(tiny_vit, tmp_path / "dense.safetensors")


def image_folder(root: Path, classes: int = 5, each: int = 8) -> Path:
    """Folders of coloured noise: each class has a colour of its own."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "validation"):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(each):
                pixels = torch.randint(0, 128, (32, 32, 3), generator=generator)
                pixels[..., label % 3] += 20 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("tiny", [TINY[0], TINY[1], TINY[5]], ids=["vit", "deit_distilled", "swin"])
def test_a_run_without_data_leaves_everything_that_repeats_it(tiny: Tiny, tmp_path: Path):
    events: list[Event] = []
    followed: list[str] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.values:  # the log can be followed
            followed.append((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])

    result = pipeline.compress(save(tiny, tmp_path / "dense.safetensors"), SHORT, tmp_path / "run", listen)

    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        *(
            "model.safetensors",
            "report.json",
            "report.md",
            "plan.json",
            "config.toml",
            "run.json",
            "log.jsonl",
            "stages",
        )
    }
    kept = {path.name for path in (result.folder / "stages").rglob("*.*")}
    assert kept == {"asked.json", "record.json", "data.json", "tensors.safetensors"}, "no snapshots, no locks"
    opened = open_model(result.folder)
    assert opened.plan == ChannelPlan.model_validate_json((result.folder / "plan.json").read_text())
    report = json.loads((result.folder / "report.json").read_text())
    macs = count_macs(opened.model, tiny.input_size)
    assert macs == report["after"]["macs"] <= 0.8 * report["before"]["macs"]
    assert load_config(None, result.folder / "config.toml", {}) == SHORT
    assert tomllib.loads((result.folder / "config.toml").read_text())["target_flops"] == 0.8
    rows = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["search"] * 3 + ["recover"] * 3
    assert rows == [json.loads(line) for line in followed]
    record = json.loads((result.folder / "run.json").read_text())
    assert record["seed"] == 42
    assert len(record["input"]["sha256"]) == 64
    assert any(isinstance(event, Note) and event.warning and "generated" in event.text for event in events)
    assert any("generated" in note for note in report["notes"])
    assert any(isinstance(event, StepDone) and "expected_macs" in event.values for event in events)


def test_labelled_images_give_accuracy_before_and_after(checkpoint: Path, tmp_path: Path):
    config = SHORT.model_copy(update={"data": str(image_folder(tmp_path / "images")), "tighten_steps": 2})
    comparison = pipeline.compress(checkpoint, config, tmp_path / "run", ignore).comparison
    for report in (comparison.before, comparison.after):
        assert report.accuracy is not None
        assert report.accuracy.top1 is not None
        assert report.accuracy.images == 40
    evaluation = pipeline.evaluate(tmp_path / "run", config, ignore)
    assert comparison.after.accuracy is not None
    assert evaluation.top1 == comparison.after.accuracy.top1
    for name in ("model.safetensors", "report.md", "report.json"):  # which are given to others
        assert str(tmp_path).encode() not in (tmp_path / "run" / name).read_bytes()
    assert (comparison.before.source, comparison.after.source) == ("dense.safetensors", "run/model.safetensors")
    assert load_config(None, tmp_path / "run" / "config.toml", {}) == config  # which is not


def test_a_run_repeats_itself_wherever_it_is_and_its_images_lie(checkpoint: Path, tmp_path: Path, monkeypatch):
    """Byte by byte, but for times: with other workers, folders and names of them, and files made in another order."""
    images = image_folder(tmp_path / "images")
    (images / "train" / "note.txt").write_text("passed over")
    copied = tmp_path / "elsewhere" / "pictures"
    for path in sorted(images.rglob("*.*"), reverse=True):
        copy = copied / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    config = SHORT.model_copy(update={"data": str(images), "search_weight_lr": 1e-4})
    first = pipeline.compress(checkpoint, config, tmp_path / "a" / "run", ignore).folder
    monkeypatch.chdir(copied.parent)
    others = {"data": "pictures", "workers": 2, "snapshot_minutes": 1.0, "max_memory": 1.0, "deterministic": True}
    second = pipeline.compress(Path("../dense.safetensors"), config.model_copy(update=others), Path("b"), ignore).folder
    for name in ("model.safetensors", "plan.json", "log.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    reports = [json.loads((run / "report.json").read_text()) for run in (first, second)]
    for report in reports:
        report["stages"] = [stage["stage"] for stage in report["stages"]]
        assert any(note.startswith("data/train: 1 files were passed over") for note in report["notes"])
    assert reports[0] == reports[1]


def test_the_record_says_what_repeats_a_run(finished: Path):
    record = json.loads((finished / "run.json").read_text())
    assert record["command"].startswith(f"kcrprune compress {finished.parent / 'dense.safetensors'} --out {finished} ")
    assert "--search-steps 3" in record["command"]
    assert record["flags"]["deterministic"] is False
    assert record["device"] == "cpu"
    assert len(record["images"]) == 64
    assert record["environment"]["OMP_NUM_THREADS"] == "1"
    assert set(record["origins"].values()) == {"default"}, "it was made in Python, of a RunConfig"


def test_what_exists_is_never_touched_and_what_fails_leaves_nothing(checkpoint: Path, tmp_path: Path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(OutputExistsError, match="not empty"):
        pipeline.compress(checkpoint, SHORT, taken, ignore)
    with pytest.raises(BudgetError, match=r"target 0\.01"):
        pipeline.compress(checkpoint, SHORT.model_copy(update={"target_flops": 0.01}), tmp_path / "run", ignore)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("tiny", "axes"),
    [
        (TINY[0], ("heads", "mlp_hidden")),
        (TINY[6], ("mlp_io",)),
        (TINY[10], ("mlp_hidden", "attn_value")),
    ],
    ids=["vit_heads", "swin_padded", "eva02_scaled"],
)
def test_a_run_is_cut_on_towards_a_share_of_the_original(tiny: Tiny, axes: tuple[Axis, ...], tmp_path: Path):
    dense = save(tiny, tmp_path / "dense.safetensors")
    short = SHORT.model_copy(update={"axes": axes, "search_steps": 0, "recover_steps": 0})
    first = pipeline.compress(dense, short.model_copy(update={"round_to": 1}), tmp_path / "first", ignore)
    plan = open_model(first.folder).plan
    assert plan is not None
    assert (plan.stream is not None) == ("mlp_io" in axes), "the streams stand in an order of their own"
    on = short.model_copy(update={"target_flops": 0.7, "round_to": 1, "dtype": "float16"})
    second = pipeline.compress(first.folder, on, tmp_path / "second", ignore)
    [whole, once, twice] = pipeline.report([dense, first.folder, second.folder], listener=ignore)
    assert whole.macs is not None
    assert once.macs is not None
    assert twice.macs is not None
    assert whole.macs == once.dense_macs == twice.dense_macs
    assert 0.66 * whole.macs < twice.macs <= 0.7 * whole.macs < once.macs
    assert second.comparison.before.macs == once.macs
    assert any("cut on from 0.7" in note for note in second.comparison.notes)
    assert twice.file_bytes < 0.7 * once.file_bytes, "stored as halves"
    with pytest.raises(BudgetError, match=r"of the dense MACs already, and target 0\.85 is a share of the same"):
        pipeline.compress(first.folder, short.model_copy(update={"target_flops": 0.85}), tmp_path / "third", ignore)


def test_branches_go_on_the_way_to_a_target_that_is_out_of_reach_else(checkpoint: Path, tmp_path: Path):
    """A step of the budget takes branches, and the next one scores a network that is zero there."""
    config = SHORT.model_copy(update={"target_flops": 0.53, "min_width": 0.0, "tighten_steps": 2, "recover_steps": 2})
    result = pipeline.compress(checkpoint, config, tmp_path / "run", ignore)
    opened, after = open_model(result.folder), result.comparison.after
    assert opened.plan
    assert 0 < len(opened.plan.gone) < 4
    assert after.macs == count_macs(opened.model, (3, 32, 32)) <= 0.53 * (after.dense_macs or 0)
    assert {block.site for block in after.blocks if 0 in block.kept.values()} == {
        site.rpartition(".")[0] for site in opened.plan.gone
    }
    with pytest.raises(BudgetError, match=r"min_width 0, with which whole branches may go, reaches 0\.5"):
        pipeline.compress(checkpoint, config.model_copy(update={"min_width": 0.05}), tmp_path / "refused", ignore)


def test_another_network_may_be_the_teacher(checkpoint: Path, tiny_vit: Tiny, tmp_path: Path):
    """What is nearest to the network itself is far from another one's answers."""
    other = save(tiny_vit, tmp_path / "teacher.safetensors", tiny_vit.model(seed=1))
    short = SHORT.model_copy(update={"search_steps": 0, "recover_steps": 0})
    distances = []
    for name, teacher in {"own": None, "other": str(other)}.items():
        config = short.model_copy(update={"teacher": teacher})
        folder = pipeline.compress(checkpoint, config, tmp_path / name, ignore).folder
        found = json.loads((folder / "run.json").read_text())["decisions"]["plans"]["held_out_distillation"]
        distances.append(found["scores"])
    assert distances[0] < distances[1]
    smaller = save(TINY[5], tmp_path / "swin.safetensors")
    with pytest.raises(ConfigError, match=r"has the input size \(3, 56, 56\), and the network \(3, 32, 32\)"):
        pipeline.compress(checkpoint, short.model_copy(update={"teacher": str(smaller)}), tmp_path / "x", ignore)


def test_export_takes_the_newest_run_and_report_knows_all_three(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run of kcrprune lies below"):
        pipeline.export(None, None, ignore)
    result = pipeline.compress(checkpoint, SHORT.model_copy(update={"bench": True}), None, ignore)
    folder, speed = result.folder, result.speed
    assert folder == Path("kcrprune-runs/dense-0.8")
    assert speed is not None
    assert speed.ratio is not None
    assert (speed.batch, speed.runtime) == (1, "PyTorch on the CPU")
    after = result.comparison.after
    assert after.macs is not None
    assert after.dense_macs is not None
    assert speed.realised == pytest.approx((1 - speed.ratio) / (1 - after.macs / after.dense_macs))
    assert "realised" not in (folder / "report.json").read_text()  # which is the same from run to run
    exported = pipeline.export(None, None, ignore)
    assert exported.path == folder / "model.onnx"
    dense, pruned, graph = pipeline.report([checkpoint, folder, exported.path], listener=ignore)
    assert (dense.state, pruned.state, graph.state) == ("dense", "pruned", "onnx")
    assert pruned.macs == graph.macs
    assert pruned.dense_macs == dense.macs
    assert dense.activation_bytes is not None
    assert pruned.activation_bytes is not None
    assert pruned.activation_bytes <= dense.activation_bytes
    own, other = pipeline.report([folder, exported.path], bench=Bench(batch=(3, 2), threads=1), listener=ignore)
    assert [(timing.batch, timing.threads, timing.ratio) for timing in own.timings] == [(3, 1, None), (2, 1, None)]
    assert {timing.runtime for timing in other.timings} == {"ONNX Runtime's CPUExecutionProvider"}
    assert all(timing.ratio and timing.realised is None for timing in other.timings)  # the same MACs
    monkeypatch.setattr(timed, "export_onnx", lambda model, path, **_: shutil.copy(exported.path, path))
    (own,) = pipeline.report([folder], bench=Bench(provider="onnx-cpu", batch=(2,)), listener=ignore)
    assert [timing.runtime for timing in own.timings] == ["ONNX Runtime's CPUExecutionProvider"]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' is not here"):
            pipeline.report([folder], bench=Bench(provider="cuda"), listener=ignore)


def test_inspect_tells_what_can_be_cut(checkpoint: Path):
    found = pipeline.inspect(checkpoint, RunConfig())
    assert found.architecture == "vit_tiny_patch16_224"
    assert set(found.floor) == {"default", "paper", "all axes"}
    assert found.floor["all axes"] <= min(found.floor.values())


def bare_backbone(path: Path) -> Path:
    """A timm checkpoint without a classifier."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    save_file(model.state_dict(), path)
    return path


def test_a_projection_is_measured_by_its_features_from_the_run_to_the_graph(tiny_vit: Tiny, tmp_path: Path):
    path = save(tiny_vit, tmp_path / "dense.safetensors", outputs="features")
    config = SHORT.model_copy(update={"data": str(image_folder(tmp_path / "images")), "recover_steps": 1})
    result = pipeline.compress(path, config, tmp_path / "run", ignore)
    before, after = result.comparison.before.accuracy, result.comparison.after.accuracy
    assert before is not None
    assert before.top1 is None
    assert after is not None
    assert after.distance is not None
    assert 0 < after.distance < 1
    assert after.cosine is not None
    assert after.retrieval is not None
    assert (after.top1, after.agreement) == (None, None)
    steps = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert all("labels" not in step for step in steps)
    exported = pipeline.export(result.folder, None, ignore)
    pruned, graph = pipeline.report([result.folder, exported.path], listener=ignore)
    assert (pruned.outputs, graph.outputs) == ("features", "features")
    assert set(pruned.stated) == {"kernel", "accuracy", "dense_macs"}
    assert {"parameters", "macs"} <= set(graph.stated)
    assert result.comparison.after.stated == ()
    assert [value.name for value in onnx.load(exported.path).graph.output] == ["features"]
    for model in (result.folder, exported.path):
        with pytest.raises(DataError, match="are features, which name no class, so there is no top-1 by labels"):
            pipeline.evaluate(model, config, ignore)
    with pytest.raises(ConfigError, match="'labels' needs labelled images and a network of classes"):
        pipeline.compress(path, config.model_copy(update={"task": "labels"}), tmp_path / "other", ignore)


def test_a_bare_backbone_is_cut_without_a_top1(tmp_path: Path):
    config = SHORT.model_copy(update={"data": str(image_folder(tmp_path / "images")), "num_heads": 2})
    comparison = pipeline.compress(
        bare_backbone(tmp_path / "x.safetensors"), config, tmp_path / "run", ignore
    ).comparison
    assert comparison.after.macs is not None
    assert comparison.before.macs is not None
    assert comparison.after.macs <= 0.8 * comparison.before.macs
    assert comparison.after.accuracy is not None
    assert comparison.after.accuracy.top1 is None
    assert comparison.after.accuracy.distance is not None


def test_a_new_classifier_learns_from_labels_alone_and_is_never_a_teacher(tmp_path: Path):
    photos = str(image_folder(tmp_path / "images"))
    config = SHORT.model_copy(update={"data": photos, "num_heads": 2, "num_classes": 5, "search_steps": 0})
    path = bare_backbone(tmp_path / "x.safetensors")
    result = pipeline.compress(path, config, tmp_path / "run", ignore)
    steps = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert len(steps) == SHORT.recover_steps
    assert all("labels" in step and "distill" not in step for step in steps)
    with pytest.raises(ConfigError, match="a search that freezes it learns nothing: give search_weight_lr"):
        pipeline.compress(
            path, config.model_copy(update={"search_steps": 3, "search_weight_lr": 0}), tmp_path / "other", ignore
        )
    for wrong in ({"task": "distill"}, {"recover_steps": 0}, {"labels": False}):
        with pytest.raises(ConfigError, match="the classifier is new, so it must be trained"):
            pipeline.compress(path, config.model_copy(update=wrong), tmp_path / "other", ignore)


def test_labels_that_are_missing_are_missed_before_anything_is_done(checkpoint: Path, tmp_path: Path):
    events: list[Event] = []
    config = SHORT.model_copy(update={"task": "labels"})
    with pytest.raises(ConfigError, match="'labels' needs labelled images"):
        pipeline.compress(checkpoint, config, tmp_path / "run", events.append)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["load"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_no_block_matches_is_named(option: str, checkpoint: Path, tmp_path: Path):
    config = SHORT.model_copy(update={option: ("blocks.0", "blokcs.*")})
    with pytest.raises(
        ConfigError, match=r"no block is named 'blokcs\.\*'; the blocks here are blocks\.0 to blocks\.1"
    ):
        pipeline.compress(checkpoint, config, tmp_path / "run", ignore)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_network_whose_answers_depend_on_nothing_is_refused(steps: int, tiny_vit: Tiny, tmp_path: Path):
    model = tiny_vit.model()
    model.load_state_dict(model.state_dict() | {"head.weight": torch.zeros(5, 24)})
    path = save(tiny_vit, tmp_path / "x.safetensors", model)
    with pytest.raises(CheckpointError, match="every score is zero: on 24 images nothing that may be cut changes"):
        pipeline.compress(path, SHORT.model_copy(update={"search_steps": steps}), tmp_path / "run", ignore)
    assert not (tmp_path / "run" / "run.json").exists()
    assert (tmp_path / "run" / "stages").exists(), "what came before is kept"


def test_images_that_do_not_suffice_are_told_of(checkpoint: Path, tmp_path: Path):
    few = SHORT.model_copy(update={"calibration_images": 100, "search_steps": 0, "recover_steps": 0})
    comparison = pipeline.compress(checkpoint, few, tmp_path / "run", ignore).comparison
    assert "calibration_images: 100 are asked for, and there are 39" in comparison.notes
    assert not any("score_images" in note for note in comparison.notes)


def test_a_diverged_recovery_is_undone_and_its_log_is_json(checkpoint: Path, tmp_path: Path):
    wild = {"lr": 1e30, "warmup_steps": 0, "search_steps": 0, "kernel_every": 2}
    result = pipeline.compress(checkpoint, SHORT.model_copy(update=wild), tmp_path / "run", ignore)
    folder = result.folder
    assert any(note.startswith("recover, step 1: held_out is nan") for note in result.comparison.notes)
    assert json.loads((folder / "run.json").read_text())["decisions"]["recover"]["kept_step"] == 0
    log = (folder / "log.jsonl").read_text()
    assert "NaN" not in log
    assert any(step["held_out"] is None for step in map(json.loads, log.splitlines()))


def test_a_dataset_without_a_folder_is_evaluated(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="name a folder with --data, or a timm dataset with --dataset"):
        pipeline.evaluate(checkpoint, RunConfig(), ignore)
    opened: list[str] = []

    def images(data: str | None, *_: object, dataset: str, **__: object) -> TensorDataset:
        opened.append(f"{dataset} in {data}")
        return TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))

    monkeypatch.setattr("kcrprune.pipeline.verbs.open_evaluation", images)
    assert pipeline.evaluate(checkpoint, RunConfig(dataset="hfds/x", workers=0, device="cpu"), ignore).images == 4
    assert opened == ["hfds/x in None"]


def test_where_the_plan_of_the_scores_is_kept_the_run_is_one_without_a_search(checkpoint: Path, tmp_path: Path):
    weights = []
    for steps in (3, 0):
        config = SHORT.model_copy(update={"search_steps": steps, "search_weight_lr": 0.01})
        result = pipeline.compress(checkpoint, config, tmp_path / f"run-{steps}", ignore)
        assert any("the scores' plan kept" in note for note in result.comparison.notes) == (steps > 0)
        weights.append(open_model(result.folder).model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_where_the_searchs_plan_is_kept_its_weights_and_its_steps_go_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Compared, "lower", True)
    networks = []
    for rate in (0.0, 1e-2):
        told = {"search_steps": 2, "search_lr": 5.0, "search_weight_lr": rate, "recover_steps": 3}
        result = pipeline.compress(checkpoint, SHORT.model_copy(update=told), tmp_path / f"{rate}", ignore)
        assert any(re.match("selection: 2 steps, [1-9].* kept$", note) for note in result.comparison.notes)
        steps = [json.loads(line)["stage"] for line in (result.folder / "log.jsonl").read_text().splitlines()]
        assert steps == ["search"] * 2 + ["recover"] * (1 if rate else 3)
        decided = json.loads((result.folder / "run.json").read_text())["decisions"]
        assert decided["plans"]["chosen"] == "search"
        networks.append(open_model(result.folder).model)
    moved = (networks[0].cls_token - networks[1].cls_token).abs().max()
    assert moved > 5e-3, "no refit touches the class token, so that the search has trained it"


def test_a_search_that_diverges_leaves_the_plan_of_the_scores(checkpoint: Path, tmp_path: Path):
    wild = SHORT.model_copy(update={"search_weight_lr": 1e30, "recover_steps": 2})
    result = pipeline.compress(checkpoint, wild, tmp_path / "run", ignore)
    assert any(re.match(r"search, step \d: .* the plan of the scores is kept$", n) for n in result.comparison.notes)
    assert json.loads((result.folder / "run.json").read_text())["decisions"]["plans"]["chosen"] == "scores"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_ends_where_the_cpu_does(checkpoint: Path, tiny_vit: Tiny, tmp_path: Path):
    exact = {"precision": "fp32", "search_steps": 0, "recover_steps": 0}
    outputs = []
    for device in ("cpu", "cuda"):
        config = SHORT.model_copy(update={"device": device, **exact})
        folder = pipeline.compress(checkpoint, config, tmp_path / device, ignore).folder
        with torch.no_grad():
            outputs.append(kcrprune.load(folder)(tiny_vit.images()))
    assert relative_error(outputs[1], outputs[0]) < 1e-2


@pytest.mark.parametrize("recipe", ["paper", "no-train", "default"])
def test_every_recipe_runs_with_its_own_task(recipe: str, checkpoint: Path, tmp_path: Path):
    short = {
        "batch_size": 8,
        "data": str(image_folder(tmp_path / "photos")),
        "workers": 0,
        "target_flops": 0.8,
        "device": "cpu",
    }
    config = load_config(recipe, None, short)
    config = config.model_copy(
        update={name: min(3, getattr(config, name)) for name in ("search_steps", "recover_steps")}
    )
    result = pipeline.compress(checkpoint, config, tmp_path / "run", ignore)
    assert result.comparison.after.macs is not None
    assert result.comparison.before.macs is not None
    assert result.comparison.after.macs <= 0.8 * result.comparison.before.macs
