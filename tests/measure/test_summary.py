import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcrprune.measure.report import Accuracy, BlockWidths, Network, StageTime, Timing
from kcrprune.measure.summary import (
    STATED,
    network_table,
    notes_of,
    speed_line,
    stage_table,
    summary,
    tables_of,
    to_markdown,
    width_table,
)
from tests.measure.examples import AFTER, BLOCK, COMPARISON, INSPECTION, report


def cells(markdown, label):
    """The cells behind the first one of the row that `label` opens."""
    (row,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_a_run_shows_before_after_and_the_change():
    text = to_markdown(COMPARISON)
    assert text.startswith("# vit_small_patch16_224: cut to 0.700 of its MACs\n")
    assert cells(text, "parameters") == ["22.05 M", "15.00 M", "x 0.680"]
    assert cells(text, "MACs of one image") == ["4.60 G", "3.22 G", "x 0.700"]
    assert cells(text, "file size") == ["88.27 MB", "88.27 MB", "x 1.000"]
    assert cells(text, "top-1") == ["84.65 %", "84.25 %", "-0.40 points"]
    assert cells(text, "agreement with the dense network") == ["-", "95.00 %", ""]
    assert cells(text, "blocks.0") == ["40 of 96", "2"]
    assert cells(text, "search") == ["1 min 15 s", "-", "-", "1.05 GB"]
    assert cells(text, "order") == ["4.0 s", "2.5", "3.0 s", "-"]
    assert cells(text, "all") == ["1 min 20 s", "", "3.0 s", "1.05 GB"]
    assert '`target_flops = 0.7`, `recipe = "default"`' in text
    assert text.count("no data: images were generated") == 1


def test_a_run_shows_what_the_cut_took_and_what_recovery_gave_back():
    text = to_markdown(COMPARISON.model_copy(update={"cut": Accuracy(images=10_000, top1=0.801, agreement=0.9)}))
    assert "| before | 84.65 % | 0.5 | - |" in text
    assert cells(text, "cut and refitted") == ["80.10 %", "-", "90.00 %"]
    assert cells(text, "after") == ["84.25 %", "-", "95.00 %"]
    assert "top5" not in text


def test_what_nobody_measured_has_no_row():
    text = to_markdown(report(kernel=None, accuracy=None, dense_macs=None))
    assert not re.search("KC|TNN|top-1|loss|agreement|activations|Time|share of", text)
    assert "change" not in text


def test_features_have_figures_of_their_own():
    near = Accuracy(images=100, distance=0.01234, cosine=0.99376, retrieval=0.87)
    cut = COMPARISON.model_copy(
        update={"cut": near, "after": report(accuracy=near), "before": report(accuracy=Accuracy(images=100))}
    )
    text = to_markdown(cut)
    assert cells(text, "relative squared distance to its features") == ["-", "0.01234", ""]
    assert cells(text, "cosine with its features") == ["-", "0.9938", ""]
    assert cells(text, "retrieval agreement with the dense network") == ["-", "87.00 %", ""]
    assert cells(text, "cut and refitted") == ["0.01234", "0.9938", "87.00 %"]
    assert not re.search(r"top-?1|top-?5|loss", text)


def test_what_a_file_says_of_itself_is_called_stated():
    text = to_markdown([report(stated=("accuracy", "dense_macs")), report()])
    assert cells(text, "top-1") == ["84.65 % (stated)", "84.65 %", "+0.00 points"]
    assert cells(text, "share of the dense MACs")[0].endswith(" (stated)")
    assert "stated" not in cells(text, "parameters")[0]
    assert "- stated: the file's own word, not measured now" in text
    assert "stated" not in to_markdown(report())


def test_networks_stand_side_by_side():
    reports = [report(source=name) for name in ("a.pth", "b.pth", "c.onnx")]
    assert summary(reports).header == ("", "a.pth", "b.pth", "c.onnx")
    assert to_markdown(reports).startswith("# a.pth and b.pth and c.onnx\n")


def test_only_a_cut_network_keeps_widths():
    whole = BLOCK.model_copy(update={"kept": BLOCK.dense})
    titles = [table.title for table in tables_of([report(blocks=(whole,)), AFTER])]
    assert titles == ["Summary", "Widths of in/vit.pth", "Kept widths of run/model.safetensors"]


def test_an_inspection_says_what_a_pickle_mentions():
    text = to_markdown(INSPECTION)
    assert cells(text, "floor of recipe paper") == ["0.444"]
    assert "argparse.Namespace" in text
    assert "- the keys are timm's" in text


@given(source=st.text(min_size=1), note=st.text(min_size=1))
def test_strange_names_break_no_table(source, note):
    text = to_markdown([report(source=source, notes=(note,)), AFTER])
    assert len([line for line in text.split("\n") if line.startswith("#")]) == 4  # title, two tables, notes
    rows = [line for line in text.split("\n") if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows[: len(tables_of([report(), AFTER])[0].rows)]}
    assert widths == {5}  # four columns


DENSE_TIME = Timing(batch=8, runtime="PyTorch on the CPU", threads=2, rounds=40, p50_ms=100.04, p90_ms=120)
CUT_TIME = DENSE_TIME.model_copy(
    update={"p50_ms": 76.0, "ratio": 0.76, "ratio_low": 0.7449, "ratio_high": 0.781, "realised": 0.8}
)


def test_networks_that_were_timed_stand_batch_by_batch():
    twice = (CUT_TIME.model_copy(update={"batch": 1, "realised": None}), CUT_TIME)
    alone = (DENSE_TIME.model_copy(update={"batch": 1}), DENSE_TIME)
    text = to_markdown((report(timings=alone), report(source="run", timings=twice)))
    rows = [line for line in text.splitlines() if "PyTorch" in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 1", "in/vit.pth"], ["| 1", "run"], ["| 8", "in/vit.pth"], ["| 8", "run"],
    ]  # fmt: skip
    assert rows[2].endswith("| PyTorch on the CPU | 2 | 40 | 100.0 ms | 120.0 ms | - | - |")
    assert rows[3].endswith("| 76.0 ms | 120.0 ms | 0.760 (0.745 to 0.781) | 0.80 |")
    assert rows[1].endswith("| 0.760 (0.745 to 0.781) | - |")


def test_a_run_ends_with_its_time_beside_its_macs():
    assert speed_line(CUT_TIME, COMPARISON) == (
        "8 images at once in 0.76 of the dense time (0.74 to 0.78), with 0.700 of its MACs: "
        "0.80 of the MACs saved is time saved (PyTorch on the CPU, 2 threads)"
    )
    one = CUT_TIME.model_copy(update={"batch": 1, "threads": 1, "realised": None})
    assert speed_line(one, COMPARISON).startswith("1 image in 0.76")
    assert speed_line(one, COMPARISON).endswith("MACs (PyTorch on the CPU, 1 thread)")


def test_what_activations_take_is_a_size():
    text = to_markdown((report(activation_bytes=4_000_000), report(activation_bytes=3_000_000)))
    assert cells(text, "peak activations of one image") == ["4.00 MB", "3.00 MB", "x 0.750"]


def test_stages_have_a_column_for_a_gpu_where_one_was_used_and_a_sum_of_what_adds_up():
    stages = (
        StageTime(stage="a", seconds=1.5, peak_memory_mib=100, peak_device_mib=None),
        StageTime(stage="b", seconds=2.25, passes=3, algebra_seconds=1, peak_memory_mib=90, peak_device_mib=50),
    )
    table = stage_table(stages)
    assert table.header == (
        "stage",
        "time",
        "passes of the dense network",
        "algebra",
        "peak memory so far",
        "of the GPU",
    )
    assert table.rows == (
        ("a", "1.5 s", "-", "-", "104.86 MB", "-"),
        ("b", "2.2 s", "3.0", "1.0 s", "94.37 MB", "52.43 MB"),
        ("all", "3.8 s", "", "1.0 s", "104.86 MB", "52.43 MB"),
    )
    alone = stage_table(stages[:1])
    assert "of the GPU" not in alone.header
    assert alone.rows[-1] == ("all", "1.5 s", "", "-", "104.86 MB")
    assert stage_table(()).rows == (("all", "0.0 s", "", "-", "-"),)


def test_widths_are_whole_cut_or_absent_and_axes_stand_in_their_order():
    blocks = (
        BlockWidths(site="a", dense={"mlp_hidden": 8, "mlp_io": 4}, kept={"mlp_hidden": 0, "mlp_io": 4}),
        BlockWidths(site="b", dense={"heads": 2}, kept={"heads": 2}),
    )
    table = width_table(blocks)
    assert table.title == "Kept widths"
    assert table.header == ("block", "mlp_io", "mlp_hidden", "heads")
    assert table.rows == (("a", "4", "0 of 8", "-"), ("b", "-", "-", "2"))
    assert width_table(blocks[1:]).title == "Widths"


def test_networks_of_timm_are_cut_refused_or_cut_in_part():
    table = network_table(
        (
            Network(name="a", family="vit", transformer=True, axes=("mlp_hidden", "heads"), floor=0.12345),
            Network(name="b", family="x", transformer=False, refused="no attention"),
            Network(name="c", family="x", transformer=True, axes=("heads",), floor=1, whole={"A": "why", "B": "so"}),
        )
    )
    assert table.rows == (
        ("a", "mlp_hidden, heads", "0.123", "-"),
        ("b", "refused", "-", "no attention"),
        ("c", "heads", "1.000", "A: why; B: so"),
    )


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, {"classes": "1000", "can be cut": "mlp_hidden"}),
        ({"class_count": 0, "feature_count": 512}, {"features": "512"}),
        ({"axes": ()}, {"can be cut": "nothing"}),
        ({"floor": {"all axes": 0.05}}, {"floor of recipe all axes": "0.05"}),
    ],
)
def test_the_facts_of_a_file(changes, rows):
    (table,) = tables_of(INSPECTION.model_copy(update=changes))
    found = {row[0]: row[1] for row in table.rows}
    assert rows.items() <= found.items()
    assert ("features" in found) != ("classes" in found)
    assert found["resize"] == "bicubic, crop 1 (center)"
    assert found["mean"] == "0.5, 0.5, 0.5"
    assert found["input"] == "3 x 224 x 224"
    assert found["preprocessing from"] == "the registered model"


def test_a_sentence_is_said_once_and_those_of_a_run_come_first():
    told = COMPARISON.model_copy(update={"notes": ("of the run", "no data: images were generated")})
    assert notes_of(told) == ("of the run", "no data: images were generated")
    stated = COMPARISON.model_copy(update={"after": report(stated=("macs",), notes=("new",))})
    assert notes_of(stated) == ("no data: images were generated", "new", STATED)
    assert notes_of([report(notes=())]) == ()
    assert notes_of(INSPECTION.model_copy(update={"foreign_names": ()})) == ("the keys are timm's",)


def test_figures_change_by_a_ratio_by_points_or_not_at_all():
    def change(label, first, second):
        table = summary((report(**first), report(**second)))
        return next(row[-1] for row in table.rows if row[0] == label)

    assert change("parameters", {"parameters": 0}, {"parameters": 5}) == "", "nothing has no multiple"
    assert change("parameters", {"parameters": 4}, {"parameters": 5}) == "x 1.250"
    assert change("MACs of one image", {"macs": None}, {}) == ""
    assert change("share of the dense MACs", {}, {"macs": 1}) == ""
    assert change(
        "top-1", {"accuracy": Accuracy(images=1, top1=0.5)}, {"accuracy": Accuracy(images=1, top1=0.505)}
    ) == ("+0.50 points")


@pytest.mark.parametrize(
    ("first", "second", "title"),
    [
        ({}, {"macs": None}, "vit_small_patch16_224: cut"),
        ({"macs": None, "architecture": None}, {}, "vit.pth: cut"),
        ({}, {"macs": 4_598_882_304}, "vit_small_patch16_224: cut to 1.000 of its MACs"),
    ],
)
def test_a_run_is_called_after_its_network_and_its_share(first, second, title):
    named = COMPARISON.model_copy(update={"before": report(**first), "after": report(**second)})
    assert to_markdown(named).startswith(f"# {title}\n")


def test_a_run_for_a_time_ends_with_what_was_asked_for():
    timed = COMPARISON.model_copy(update={"settings": {"target_latency": "80ms"}})
    assert ", 76.0 ms; the target was 80ms, with 0.700 of its MACs: 0.80 of" in speed_line(CUT_TIME, timed)
    unknown = COMPARISON.model_copy(update={"after": report(macs=None)})
    assert "MACs" not in speed_line(CUT_TIME.model_copy(update={"realised": None}), unknown)
    assert "1 image in" in speed_line(CUT_TIME.model_copy(update={"batch": 1}), COMPARISON)


def test_tables_that_say_nothing_are_left_out():
    bare = COMPARISON.model_copy(update={"stages": (), "after": report()})
    assert [table.title for table in tables_of(bare)] == ["Summary"]
    assert [table.title for table in tables_of(COMPARISON)] == ["Summary", "Kept widths", "Stages"]
    half = (report(timings=(DENSE_TIME,)), report())
    assert [table.title for table in tables_of(half)] == ["Summary"], "of one alone there is nothing to compare"
