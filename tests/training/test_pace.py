import pytest

from kcrprune.training import pace
from kcrprune.training.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "monotonic", lambda: now[0])
    return now


def test_without_a_clock_it_is_the_steps(clock):
    found = Pace(4)
    for done in range(1, 5):
        assert not found.ended
        found.move_(done)
        clock[0] += 1e9
        assert found.at == done
    assert found.ended


def test_the_clock_ends_a_slow_training_at_the_end_of_its_course(clock):
    found = Pace(100, until=110.0)
    course = []
    while not found.ended:
        clock[0] += 1.0
        found.move_(len(course) + 1)
        course.append(found.at)
    assert course == pytest.approx([10.0 * second for second in range(1, 11)])


def test_a_fast_one_does_all_its_steps(clock):
    found = Pace(3, until=110.0)
    for done in (1, 2):
        clock[0] += 0.1
        found.move_(done)
        assert found.at == done
    assert not found.ended


def test_what_goes_on_behind_some_steps_has_the_rest_of_the_course_for_the_time(clock):
    found = Pace(100, until=110.0)
    found.start_(60)
    clock[0] += 5.0
    found.move_(61)
    assert found.at == pytest.approx(80.0)


def test_no_time_left_is_the_end(clock):
    assert Pace(100, until=99.0).ended
