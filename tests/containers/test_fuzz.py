"""A small part of the fuzzing, in this process; `python -m tests.containers.fuzz` is the whole."""

import signal

import pytest

from tests.containers import fuzz
from tests.containers.corpus import honest, hostile

CASES = 250


@pytest.fixture
def restored_alarm():
    """The processor-time alarm as it was."""
    before = signal.getsignal(signal.SIGPROF)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.filterwarnings("ignore")  # torch's and onnx's own while the corpus is made
@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="the alarm is POSIX")
@pytest.mark.usefixtures("restored_alarm")
def test_damaged_files_end_well():
    found = list(fuzz.outcomes(range(CASES), seed=1))
    assert [outcome for outcome in found if not outcome.is_ours] == []
    opened = [outcome.name for outcome in found if outcome.kind == "opened"]
    assert len(opened) > 15  # the corpus reaches the end, not only the first check


@pytest.mark.filterwarnings("ignore")
def test_honest_files_open_and_hostile_ones_do_what_they_say(tmp_path):
    witness = tmp_path / "code-ran"
    good, bad = honest(tmp_path), hostile(witness)
    folder = tmp_path / "opened"
    folder.mkdir()
    for case in range(len(good) + len(bad)):
        outcome = fuzz.run_case(case, 0, [*good, *bad], folder, untouched=len(good) + len(bad))
        assert outcome.is_ours, outcome
        assert case >= len(good) or outcome.kind == "opened", outcome
    assert not witness.exists()


def test_what_is_no_error_of_ours_is_found(monkeypatch, tmp_path):
    def stumble(path):
        raise RecursionError

    monkeypatch.setattr(fuzz, "_compute", stumble)
    (tmp_path / "opened").mkdir()
    outcome = fuzz.run_case(0, 0, honest(tmp_path), tmp_path / "opened", untouched=1)
    assert (outcome.kind, outcome.is_ours) == ("RecursionError", False)
