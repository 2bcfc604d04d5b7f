import tomllib

import pytest

from kcrprune.config import RECIPES, RunConfig, load_config, origins
from kcrprune.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_flag_wins_over_the_file_which_wins_over_the_recipe(toml):
    recipe = load_config("no-train")
    file = toml("search_steps = 7\nrecover_steps = 8\n")
    written = load_config("no-train", file)
    flagged = load_config("no-train", file, {"recover_steps": 9})
    assert (recipe.search_steps, recipe.recover_steps) == (0, 0)
    assert recipe.calibration_images > RunConfig().calibration_images
    assert (written.search_steps, written.recover_steps) == (7, 8)
    assert (flagged.search_steps, flagged.recover_steps) == (7, 9)
    known = origins("no-train", file, {"recover_steps": 9})
    assert {
        name: known.get(name) for name in ("calibration_images", "search_steps", "recover_steps", "recipe", "lr")
    } == {
        "calibration_images": "recipe",
        "search_steps": "file",
        "recover_steps": "flag",
        "recipe": "flag",
        "lr": None,
    }


def test_the_file_may_name_the_recipe_and_the_flag_another_one(toml):
    file = toml('recipe = "no-train"\n')
    assert load_config(file=file).recipe == "no-train"
    assert load_config(file=file).search_steps == 0
    assert load_config(file=file, flags={"recipe": "default"}) == RunConfig()


def test_without_anything_the_defaults_are_the_default_recipe():
    assert load_config() == RunConfig()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name):
    assert load_config(name).recipe == name


def test_every_recipe_file_is_listed():
    from importlib import resources

    files = {path.name for path in (resources.files("kcrprune") / "recipes").iterdir()}
    assert files == {f"{name}.toml" for name in RECIPES}


@pytest.mark.parametrize(("size", "kept"), [(224, 224), ([64, 16], (64, 16)), ([32, 32], 32), (["64", "16"], (64, 16))])
def test_an_image_has_one_side_or_two(size, kept):
    assert load_config(flags={"img_size": size}).img_size == kept


@pytest.mark.parametrize(
    ("written", "kept"), [("70%", 0.7), (0.7, 0.7), ("5ms", "5ms"), (" 12.5 ms", "12.5ms"), ("0.25", 0.25)]
)
def test_a_time_is_a_share_or_milliseconds_and_macs_are_then_no_limit(toml, written, kept):
    from kcrprune.run.saving import to_toml

    config = load_config(flags={"target_latency": written})
    assert (config.target_latency, config.target_flops, config.timed) == (kept, 1.0, True)
    assert load_config(file=toml(to_toml(config))) == config
    assert load_config(flags={"target_latency": written, "target_flops": "1.0"}) == config


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_is_what_toml_and_torch_can_hold(seed):
    with pytest.raises(ConfigError, match=f"seed = {seed}"):
        load_config(flags={"seed": seed})
    assert load_config(flags={"seed": 2**63 - 1}).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('scores = "fisher"', ["run.toml", "'scores'", "did you mean ranking?"]),
        ("stages = 2", ["'stages'", "did you mean tighten_steps?"]),
        ("target_flop = 0.5", ["run.toml", "'target_flop'", "did you mean target_flops or target_latency?"]),
        ("zzzz = 1", ["'zzzz'", "--help"]),
        (
            "target_flops = 1.5",
            ["run.toml", "target_flops = 1.5", "less than or equal to 1", "Share of the dense MACs"],
        ),
        ('axes = ["mlp"]', ["axes = 'mlp'", "mlp_hidden"]),
        ("axes = []", ["axes: name at least one axis"]),
        ("temperature = 0.1", ["temperature_floor 0.3 is above temperature 0.1"]),
        ("lr = inf", ["lr = inf", "finite"]),
        ('interpolation = "random"', ["interpolation = 'random'", "bicubic"]),
        ("search_spread = 1e300", ["search_spread = 1e+300", "10000"]),
        ("crop_pct = 0.001", ["crop_pct = 0.001", "0.05"]),
        ("std = [0.5, 0.0, 0.5]", ["std = 0.0", "0.000001"]),
        ("img_size = 30000", ["img_size = 30000", "2048", "height and width as 64,16"]),
        ("img_size = [64, 16, 3]", ["img_size = [64, 16, 3]"]),
        ("img_size = [[64], [16]]", ["img_size = ([64], [16])"]),
        (
            'ranking = "equal"\ntighten_steps = 2\nsearch_steps = 3',
            ["ranking equal ranks nothing; give tighten_steps 1"],
        ),
        ("target_flops = 0.5\ntarget_latency = 0.6", ["target_flops = 0.5 and target_latency = 0.6 are two targets"]),
        ("target_latency = 1.0", ["target_latency = 1.0", "below 1, such as 0.7 or 70%, or as 5ms"]),
        ('target_latency = "infms"', ["target_latency = 'infms'", "or as 5ms"]),
        ("target_latency = true", ["target_latency = True", "or as 5ms"]),
        ('device = "gpu"', ["device = 'gpu'", "cuda:N"]),
        ('recipe = "papr"', ["no recipe 'papr'", "paper"]),
        ("axes = [", ["run.toml", "not a TOML file"]),
    ],
)
def test_a_bad_file_is_one_sentence_with_the_way_out(toml, text, words):
    with pytest.raises(ConfigError) as caught:
        load_config(file=toml(text))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_config(file=tmp_path / "none.toml")
    (tmp_path / "weights.toml").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ConfigError, match=r"weights\.toml: is not a TOML file"):
        load_config(file=tmp_path / "weights.toml")


def test_a_bad_flag_is_not_blamed_on_the_file(toml):
    file = toml("seed = 1")
    with pytest.raises(ConfigError) as caught:
        load_config(file=file, flags={"batch_size": 0})
    assert str(caught.value).startswith("batch_size = 0")


def test_a_configuration_survives_toml(toml):
    from kcrprune.run.saving import to_toml

    config = RunConfig(target_flops=0.5, axes=("heads",), mean=(0.1, 0.2, 0.3), data='a "quoted" \\ folder', include=())
    text = to_toml(config)
    assert load_config(file=toml(text)) == config
    assert "mean" in tomllib.loads(text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_nothing_that_it_turns_off_and_a_flag_that_does_is_found(recipe):
    assert load_config(recipe).without_effect() == {}
    off = {"search_steps": 0, "recover_steps": 0, "ranking": "auto"}
    flags = {"search_lr": 0.123, "lr": 0.456, "target_flops": 0.5, "reconstruct_lr": 0.1}
    expected = {"search_lr": "search_steps = 0", "lr": "recover_steps = 0"}
    found = load_config(recipe, None, off | flags).without_effect()
    assert {name: found[name] for name in expected} == expected
    assert ("reconstruct_lr" in found) == (recipe != "no-train")
    assert load_config(recipe, None, flags | {"search_steps": 3, "recover_steps": 3}).without_effect().keys() <= {
        "reconstruct_lr"
    }


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("16", 16),
        (16, 16),
        ("mlp_hidden=64, attn_value = 16", {"mlp_hidden": 64, "attn_value": 16}),
        ({"heads": 2}, {"heads": 2}),
    ],
)
def test_widths_are_rounded_alike_or_axis_by_axis(written, means):
    assert load_config(flags={"round_to": written}).round_to == means


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0", "greater than 0"),
        ("mlp=8", "there is no axis 'mlp', these are: mlp_io"),
        ("mlp_hidden=0", "mlp_hidden = '0' is no width"),
        ({"mlp_hidden": 2.5}, "mlp_hidden = 2.5 is no width"),
        ("mlp_hidden=8,", "no axis ''"),
    ],
)
def test_a_rounding_that_cannot_be_is_refused(written, said):
    with pytest.raises(ConfigError, match=f"round_to = .+ cannot work: .*{said}"):
        load_config(flags={"round_to": written})
