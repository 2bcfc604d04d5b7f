from pathlib import Path

from kcrprune.run.shared import without_places


def test_names_stand_for_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"data": f"{tmp_path}/cats", "notes": [f"in {tmp_path}/cats/train, not {tmp_path}/cats2", 3, None]}
    assert without_places(data, [Path("cats"), None]) == {
        "data": "cats",
        "notes": [f"in cats/train, not {tmp_path}/cats2", 3, None],
    }


def test_what_was_asked_relatively_stays_and_the_root_has_no_name():
    assert without_places("demo/cats of /", ["demo/cats", "/"]) == "demo/cats of /"
