import re

from hypothesis import given
from hypothesis import strategies as st

from kcrprune.measure.report import Accuracy, Timing
from kcrprune.measure.summary import speed_line, summary, tables_of, to_markdown
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
