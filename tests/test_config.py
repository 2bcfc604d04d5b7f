import tomllib

import pytest

from kcrprune.config import NETWORK, RECIPES, RunConfig, load_config, network_config, network_of, origins
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


def test_the_recipe_by_name_wins_over_one_among_the_flags_and_that_over_the_file(toml):
    file, flags = toml('recipe = "paper"\nsearch_steps = 7\n'), {"recipe": "thorough"}
    assert load_config("no-train", file, flags).recipe == "no-train"
    assert load_config(None, file, flags) == load_config("thorough", flags={"search_steps": 7})
    assert origins("no-train", file, flags)["reconstruct_epochs"] == "recipe"
    assert origins(None, file)["axes"] == "recipe", "of the paper, which the file names"
    assert origins(None, file)["recipe"] == "file"
    assert origins(None, None, flags) == {"search_steps": "recipe", "recover_steps": "recipe", "recipe": "flag"}
    assert origins() == {}


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


@pytest.mark.parametrize(
    ("cores", "loaders"), [(None, 2), (1, 2), (4, 2), (5, 2), (6, 3), (15, 7), (16, 8), (17, 8), (64, 8)]
)
def test_half_as_many_processes_load_as_there_are_cores_from_2_to_8(cores, loaders, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert RunConfig().loaders == loaders
    assert [RunConfig(workers=workers).loaders for workers in (0, 1, 100)] == [0, 1, 100]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "0.7"),
        ({"target_flops": "35%"}, "0.35"),
        ({"target_flops": 1}, "1"),
        ({"target_latency": "5.50ms"}, "5.5ms"),
        ({"target_latency": 0.65}, "time-0.65"),
    ],
)
def test_a_file_is_called_after_its_target(flags, name):
    assert load_config(flags=flags).target_name == name


@pytest.mark.parametrize(
    ("changes", "jointly", "searches"),
    [
        ({}, True, True),
        ({"search_steps": 0}, True, False),
        ({"search_steps": 1}, True, True),
        ({"target_latency": 0.7}, True, False),
        ({"recover_steps": 0}, True, False),  # the steps of both are those of the recovery
        ({"recover_steps": 0, "search_weight_lr": 0}, False, True),
        ({"recover_steps": 0, "search_split": 0.7}, False, True),
    ],
)
def test_a_search_takes_place_where_it_has_steps_and_macs_are_the_target(changes, jointly, searches):
    config = load_config(flags=changes)
    assert (config.searches_jointly, config.searches) == (jointly, searches)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": ["heads", "heads"]}, "axes: name at least one axis, and each once"),
        ({"temperature": 0.29}, "temperature_floor 0.3 is above temperature 0.29"),
        ({"ranking": "innovation", "refit": False}, "refit is off; choose fisher"),
        ({"reconstruct_epochs": 1, "refit": False}, "and refit is off; give 0"),
        ({"ranking": "equal", "search_steps": 0}, "ranking equal ranks nothing by itself; give search_steps"),
        ({"ranking": "equal", "target_latency": 0.5}, "ranking equal ranks nothing by itself"),
        ({"ranking": "equal", "tighten_steps": 2}, "tighten_steps cut before a search"),
        ({"target_flops": "70%", "target_latency": "9ms"}, "target_flops = 70% and target_latency = 9ms are two"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(changes, sentence):
    with pytest.raises(ConfigError) as refused:
        load_config(flags=changes)
    assert sentence in str(refused.value)
    assert "Value error" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.3},
        {"ranking": "innovation"},
        {"ranking": "auto", "refit": False},
        {"ranking": "fisher", "refit": False, "reconstruct_epochs": 0},
        {"ranking": "equal", "tighten_steps": 1},
        {"target_latency": "9ms", "target_flops": "100%"},
        {"target_latency": None, "target_flops": 0.5},
        {"smoothing": 0.0, "hflip": 0, "workers": 256, "kernel_weight": 0, "weight_decay": 0},
        {"std": [1e-6], "crop_pct": 4.0, "img_size": 2048, "search_spread": 1e4},
        {"device": "cuda:12", "search_split": 1, "min_width": 1},
    ],
)
def test_settings_up_to_their_bounds_are_taken(changes):
    taken = load_config(flags=changes).model_dump()
    expected = {"std": (1e-6,), "target_flops": 1.0 if changes.get("target_latency") else 0.5}
    assert {name: taken[name] for name in changes} == changes | {
        key: expected[key] for key in expected if key in changes
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smoothing", 1),
        ("hflip", 1.01),
        ("workers", 257),
        ("workers", -1),
        ("lr", 0),
        ("lr", float("nan")),
        ("clip_grad", 0),
        ("kernel_weight", -1e-9),
        ("mean", [1e4]),
        ("mean", [-1e4]),
        ("std", [1e4]),
        ("crop_pct", 4.01),
        ("img_size", 0),
        ("device", "cuda:"),
        ("device", "cuda:0:1"),
        ("device", "mps"),
        ("dtype", "float64"),
        ("max_memory", 0),
        ("max_minutes", 0),
        ("snapshot_minutes", 0),
        ("score_images", 2**31),
        ("batch_size", 0),
        ("num_heads", 0),
    ],
)
def test_a_setting_beyond_its_bounds_is_refused_with_its_name_its_value_and_its_meaning(name, value):
    with pytest.raises(ConfigError) as refused:
        load_config(flags={name: value})
    meaning = (RunConfig.model_fields[name].description or "").removesuffix(".")
    assert str(refused.value).startswith(f"{name} = ")
    assert str(refused.value).endswith(meaning)
    assert " cannot work: " in str(refused.value)


def test_how_a_file_is_read_is_told_apart_from_what_a_run_does():
    config = network_config({"num_heads": 3, "img_size": [64, 16], "mean": (0.5, 0.5, 0.5)})
    assert config == RunConfig(num_heads=3, img_size=(64, 16), mean=(0.5, 0.5, 0.5))
    given = {name: value for name, value in network_of(config).items() if value is not None}
    assert given == {"num_heads": 3, "img_size": (64, 16), "mean": (0.5, 0.5, 0.5)}
    assert tuple(network_of(config)) == NETWORK
    with pytest.raises(ConfigError, match=r"^'seed' does not say how a network is read; these do: arch, num_heads, "):
        network_config({"arch": "vit", "seed": 1})
    with pytest.raises(ConfigError, match=r"^num_heads = 0 cannot work"):
        network_config({"num_heads": 0})


@pytest.mark.parametrize(
    ("off", "lost"),
    [
        ({"refit": False}, {"refit_ridge": 0.5}),
        ({"reconstruct_epochs": 0}, {"reconstruct_lr": 0.5}),
        ({"recover_steps": 0}, {"lr": 0.5, "warmup_steps": 7, "keep_best": False}),
        ({"search_steps": 0}, {"search_lr": 0.5, "search_spread": 7.0, "search_split": 0.5, "temperature": 9.0}),
        ({"target_latency": None}, {"latency_batch": 7, "latency_table": "times.json"}),
    ],
)
def test_what_nothing_reads_is_told_with_what_turns_it_off(off, lost):
    ((switch, value),) = off.items()
    told = f"{switch} = {value}".lower()
    assert load_config(flags=off | lost).without_effect() == dict.fromkeys(lost, told)
    assert load_config(flags=lost | {switch: {"target_latency": 0.5}.get(switch, 1)}).without_effect() == {}
    assert load_config(flags=off | {"batch_size": 5}).without_effect() == {}
