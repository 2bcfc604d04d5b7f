from pathlib import Path

import pytest

from kcrprune.config import load_config
from kcrprune.run.saving import placeless
from kcrprune.run.shared import repeating, without_places
from tests.cli.conftest import COMPARISON


def test_words_stand_for_paths_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"data": f"{tmp_path}/cats", "notes": [f"in {tmp_path}/cats/train, not {tmp_path}/cats2", 3, None]}
    data |= {"relative": ["cats/train: 3 files", "as in cats", "cats of dogs", "my/cats/train"]}
    assert without_places(data, {Path("cats"): "data"}) == {
        "data": "data",
        "notes": [f"in data/train, not {tmp_path}/cats2", 3, None],
        "relative": ["data/train: 3 files", "as in data", "cats of dogs", "my/cats/train"],
    }
    assert without_places("/ and /x", {"/": "data"}) == "/ and /x", "the root of all has no name"


def test_a_folder_may_be_called_as_a_state_is():
    told = COMPARISON.model_copy(update={"notes": ("pruned/train: 3 files",)})
    found = placeless(told, {Path("pruned"): "run", Path("dense"): "dense.pth"})
    assert (found.before.state, found.after.state) == (told.before.state, told.after.state) == ("dense", "pruned")
    assert found.notes == ("run/train: 3 files",)


def test_the_command_that_repeats_a_run_has_what_differs_and_no_secrets():
    flags = {
        "target_flops": 0.5,
        "balance": False,
        "axes": ("heads",),
        "img_size": (64, 16),
        "data": "https://me:pw@x/a b",
    }
    told = repeating(Path("my vit.pth"), load_config(flags=flags | {"recipe": "no-train"}), Path("run"))
    assert told == (
        "kcrprune compress 'my vit.pth' --out run --target-flops 0.5 --recipe no-train --axes heads "
        "--data 'https://***@x/a b' --img-size 64,16 --no-balance"
    )


@pytest.mark.parametrize("secret", ["?token=abc", "&api_key=abc", "&CLIENT_SECRET=abc", "&password=abc"])
def test_secrets_in_addresses_are_stars(secret):
    config = load_config(flags={"data": f"s3://bucket{secret}&x=1"})
    told = repeating(Path("vit.pth"), config, Path("run"))
    assert "abc" not in told
    assert told.endswith("***&x=1'")
