"""The loop over stages, its table, and what a stage may read."""

import pytest
import torch

from kcrprune.config import RunConfig
from kcrprune.errors import DivergedError, KcrPruneError
from kcrprune.events import Note, StageStarted
from kcrprune.run.context import ALL, FREE, Context
from kcrprune.run.stage import Stage, execute
from kcrprune.run.stages import STAGES
from kcrprune.run.store import Codec, Store
from kcrprune.training.randomness import generator

CONFIG = RunConfig(device="cpu")


class Told(list):
    def __call__(self, event):
        self.append(event)

    @property
    def notes(self):
        return [event.text for event in self if isinstance(event, Note)]


def context(tmp_path, config=CONFIG, listener=lambda event: None):
    return Context(tmp_path / "x.pth", config, listener)


def chain(calls, *, middle="seed"):
    """Three stages that add up a setting, one after the other; `calls` learns which were made."""

    def add(name, setting):
        def make(context, before=0):
            calls.append(name)
            with context.part(name):
                drawn = torch.rand((), generator=generator(0, name, 0, "a number"))
                return before + int(getattr(context.settings, setting)) + float(drawn)

        return make

    return (
        Stage("first", ("batch_size",), (), add("first", "batch_size"), Codec(float)),
        Stage("middle", (middle,), ("first",), add("middle", middle), Codec(float)),
        Stage("last", ("warmup_steps",), ("middle",), add("last", "warmup_steps")),
    )


def run(tmp_path, calls, config=CONFIG, listener=lambda event: None):
    store = Store(tmp_path / "stages")
    store.folder.mkdir(exist_ok=True)
    return execute(chain(calls), context(tmp_path, config, listener), store, wanted=("last",))["last"]


def test_what_is_kept_is_not_made_again_and_gives_the_same(tmp_path):
    first, second, told = [], [], Told()
    result = run(tmp_path, first)
    assert run(tmp_path, second, listener=told) == result
    assert first == ["first", "middle", "last"]
    assert second == ["last"]
    assert told.notes == ["continues after: first, middle (kept from before)"]


def test_a_stage_draws_the_same_whether_those_before_it_were_made_or_kept(tmp_path):
    alone = execute(chain([]), context(tmp_path), wanted=("last",))["last"]
    run(tmp_path, [])
    assert run(tmp_path, []) == alone


@pytest.mark.parametrize(
    ("changed", "made"),
    [
        ({"batch_size": 5}, ["first", "middle", "last"]),
        ({"seed": 5}, ["middle", "last"]),
        ({"warmup_steps": 5}, ["last"]),
        ({"lr": 5.0, "workers": 7, "device": "auto"}, ["last"]),
    ],
)
def test_a_changed_setting_makes_again_what_reads_it_and_what_follows(tmp_path, changed, made):
    run(tmp_path, [])
    calls = []
    run(tmp_path, calls, CONFIG.model_copy(update=changed))
    assert calls == made
    run(tmp_path, again := [])
    assert again == ["last"], "what was kept before is still there"


def test_a_key_depends_on_name_version_settings_and_what_comes_before():
    stage = Stage("x", ("lr", "ranked_by"), (), lambda context: None)
    key = stage.key(CONFIG, {})
    others = [
        Stage("y", stage.reads, (), stage.make).key(CONFIG, {}),
        Stage("x", stage.reads, (), stage.make, version=2).key(CONFIG, {}),
        stage.key(CONFIG.model_copy(update={"lr": 1.0}), {}),
        stage.key(CONFIG.model_copy(update={"refit": False}), {}),
        stage.key(CONFIG, {}, "other images"),
        Stage("x", stage.reads, ("y",), stage.make).key(CONFIG, {"y": key}),
    ]
    assert len({key, *others}) == 7
    assert stage.key(CONFIG.model_copy(update={"ranking": "innovation", "seed": 7}), {}) == key


def test_a_result_is_forgotten_behind_the_last_stage_that_takes_it(tmp_path):
    found = execute(chain([]), context(tmp_path), wanted=("first", "last"))
    assert found.values.keys() == {"first", "last"}


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise KcrPruneError("cannot write first: No space left on device")

    result, told = run(tmp_path, []), Told()
    monkeypatch.setattr(Store, "keep", full)
    assert run(tmp_path, calls := [], CONFIG.model_copy(update={"lr": 1.0}), told) == result
    assert calls == ["last"]
    run(tmp_path, [], CONFIG.model_copy(update={"batch_size": 1}), told)
    assert any("No space left on device; the run goes on" in note for note in told.notes)


def test_a_stage_that_reads_what_it_does_not_declare_is_found(tmp_path):
    stage = Stage("x", ("lr",), (), lambda context: context.settings.lr + context.settings.seed)
    with pytest.raises(AssertionError, match="stage 'x' reads seed and does not declare it"):
        execute((stage,), context(tmp_path), wanted=("x",))
    overridden = Stage("x", (), (), lambda context: context.settings.model_copy(update={"seed": 3}).seed)
    assert execute((overridden,), context(tmp_path), wanted=("x",))["x"] == 3


def test_what_is_no_finite_number_ends_the_run_where_it_comes_up(tmp_path):
    def make(context):
        return {"blocks.0": torch.tensor([1.0, torch.inf])}

    stage = Stage("balance", (), (), make, Codec(dict[str, torch.Tensor]))
    with pytest.raises(DivergedError, match=r"^balance: blocks\.0 holds what are no finite numbers"):
        execute((stage,), context(tmp_path), wanted=("balance",))


def settings_behind(name):
    """The settings that a declared name stands for: itself, or those that a property reads."""
    if name in RunConfig.model_fields:
        return {name}
    seen = set()

    class Watched:
        def __getattr__(self, setting):
            if setting not in RunConfig.model_fields:  # another property
                return getattr(RunConfig, setting).fget(self)
            seen.add(setting)
            return getattr(CONFIG, setting)

    getattr(RunConfig, name).fget(Watched())
    return seen


def test_every_setting_is_read_by_a_stage_or_changes_no_result():
    declared = {name for stage in STAGES if stage.reads != ALL for name in stage.reads}
    behind = {setting for name in declared for setting in settings_behind(name)}
    assert behind.isdisjoint(FREE)
    assert behind | FREE.keys() == RunConfig.model_fields.keys()


def test_the_table_is_in_order_and_keeps_what_is_costly():
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(STAGES):
        assert set(stage.after) <= set(names[:number]), stage.name
        assert stage.kept is None or stage.fingerprint is None, "what reads the world is made each time"
    unkept = [stage.name for stage in STAGES if stage.kept is None]
    assert unkept == ["open", "place", "target", "images", "task", "budget", "save"]


def test_a_part_is_announced_and_timed_even_where_it_has_no_stage(tmp_path):
    told = Told()
    one = context(tmp_path, listener=told)
    with one.part("load", 3):
        pass
    assert told[0] == StageStarted("load", 3)
    assert [time.stage for time in one.told().times] == ["load"]
