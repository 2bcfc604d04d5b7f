from pathlib import Path

import pytest
from typer.main import get_command

from kcrprune.cli.app import app, run
from kcrprune.cli.options import PANELS, flag, panel
from kcrprune.config import RunConfig, load_config
from kcrprune.measure.bench import Bench

COMPRESS = get_command(app).commands["compress"]  # type: ignore[attr-defined]


def test_every_setting_is_a_flag_with_its_meaning_and_default():
    options = {option for parameter in COMPRESS.params for option in parameter.opts}
    helps = {parameter.name: parameter.help for parameter in COMPRESS.params if hasattr(parameter, "help")}
    for name, field in RunConfig.model_fields.items():
        assert flag(name) in options
        assert helps[name].startswith(field.description)
    assert "[default: 0.7]" in helps["target_flops"]
    assert "[default: mlp_hidden,conv_hidden,attn_query,attn_value]" in helps["axes"]
    assert "[default: on]" in helps["balance"]
    assert "default" not in helps["arch"]


def test_every_panel_begins_at_a_setting():
    assert PANELS.keys() <= RunConfig.model_fields.keys()
    assert next(iter(PANELS)) == next(iter(RunConfig.model_fields))
    assert panel("batch_size") == "Search and recovery"


def test_what_is_not_given_is_left_to_recipe_and_defaults(pipeline):
    assert run(["compress", "vit.pth"]) == 0
    assert pipeline.asked == {"checkpoint": Path("vit.pth"), "config": RunConfig(), "out": None}


def test_every_kind_of_flag_reaches_the_configuration(pipeline):
    words = (
        "compress vit.pth --target-flops 0.5 --axes heads,mlp_hidden --mean 0.1,0.2,0.3 --no-balance -b 4 -j 0 "
        "--ranking random --epochs 3 --data photos --out here"
    )
    assert run(words.split()) == 0
    assert pipeline.asked["out"] == Path("here")
    assert pipeline.asked["config"] == RunConfig(
        target_flops=0.5,
        axes=("heads", "mlp_hidden"),
        mean=(0.1, 0.2, 0.3),
        balance=False,
        batch_size=4,
        workers=0,
        ranking="random",
        epochs=3,
        data="photos",
    )


@pytest.mark.parametrize(("words", "size"), [("64,16", (64, 16)), ("224", 224), ("32, 32", 32)])
def test_an_image_size_is_one_side_or_two(pipeline, words, size):
    assert run(["inspect", "vit.pth", "--img-size", words]) == 0
    assert pipeline.asked["config"].img_size == size


@pytest.mark.parametrize(("written", "share"), [("70%", 0.7), ("12.5 %", 0.125), ("0.35", 0.35)])
def test_a_share_may_be_a_percentage(pipeline, written: str, share: float):
    assert run(["compress", "vit.pth", "--target-flops", written, "--min-width", written]) == 0
    assert (pipeline.asked["config"].target_flops, pipeline.asked["config"].min_width) == (share, share)


def test_a_smallest_width_may_be_nothing(pipeline):
    assert run(["compress", "vit.pth", "--min-width", "0"]) == 0
    assert pipeline.asked["config"].min_width == 0


@pytest.mark.parametrize(("name", "written"), [("--target-flops", "4.2G"), ("--kernel-rank", "half")])
def test_what_is_no_share_is_answered_with_the_form(pipeline, capsys, name: str, written: str):
    assert run(["compress", "vit.pth", name, written]) == 2
    assert f"= '{written}' cannot work: it is written as a share, such as 0.7 or 70%; " in capsys.readouterr().err


def test_a_time_is_written_as_it_is_meant(pipeline, capsys):
    assert run(["compress", "vit.pth", "--target-latency", "5ms", "--latency-batch", "8"]) == 0
    assert (pipeline.asked["config"].target_latency, pipeline.asked["config"].latency_batch) == ("5ms", 8)
    assert run(["compress", "vit.pth", "--target-latency", "5s"]) == 2
    assert "target_latency = '5s' cannot work: it is written as a share of the dense time" in capsys.readouterr().err


def test_a_percentage_above_all_is_refused(pipeline, capsys):
    assert run(["compress", "vit.pth", "--target-flops", "170%"]) == 2
    assert "target_flops = '170%' cannot work" in capsys.readouterr().err


def test_flags_win_over_the_file(pipeline, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('recipe = "no-train"\nseed = 1\nbatch_size = 8\n')
    assert run(["compress", "vit.pth", "-c", str(file), "--seed", "2"]) == 0
    assert pipeline.asked["config"] == load_config("no-train", flags={"seed": 2, "batch_size": 8})


@pytest.mark.parametrize(
    ("words", "model", "onnx"),
    [
        ("export", None, None),
        ("export --onnx", None, None),
        ("export run", Path("run"), None),
        ("export run --onnx", Path("run"), None),
        ("export --onnx --quiet run", Path("run"), None),
        ("export --onnx m.onnx", None, Path("m.onnx")),
        ("export run --onnx m.onnx", Path("run"), Path("m.onnx")),
    ],
)
def test_onnx_may_stand_without_a_file(pipeline, words, model, onnx):
    assert run(words.split()) == 0
    assert pipeline.asked == {"model": model, "onnx": onnx, "config": RunConfig(), "opset": 20}


def test_report_takes_one_model_or_two(pipeline):
    assert run(["report", "a"]) == 0
    assert pipeline.asked == {"paths": [Path("a")], "bench": None, "config": RunConfig()}
    assert run(["report", "a", "b", "--bench"]) == 0
    assert pipeline.asked == {"paths": [Path("a"), Path("b")], "bench": Bench(), "config": RunConfig()}


def test_how_networks_are_timed_is_said_and_refused(pipeline, capsys):
    words = ["report", "a", "--bench", "--provider", "onnx-cuda", "--batch", "2, 64", "--threads", "1"]
    assert run(words) == 0
    assert pipeline.asked["bench"] == Bench(provider="onnx-cuda", batch=(2, 64), threads=1)
    for batch, said in (("0", "greater than 0"), ("1,x", "'x'"), ("", "unable to parse")):
        assert run(["report", "a", "--bench", "--batch", batch]) == 2
        assert said in capsys.readouterr().err
    assert run(["report", "a", "--threads", "1"]) == 2
    assert "give --bench" in capsys.readouterr().err


def test_evaluate_and_inspect_take_the_settings_that_concern_them(pipeline):
    assert run(["evaluate", "m", "--data", "photos", "--val-split", "test", "--img-size", "56"]) == 0
    assert pipeline.asked["config"] == RunConfig(data="photos", val_split="test", img_size=56)
    assert run(["inspect", "m", "--num-heads", "3"]) == 0
    assert pipeline.asked["config"] == RunConfig(num_heads=3)
    assert run(["inspect", "m", "--target-flops", "0.5"]) == 2
