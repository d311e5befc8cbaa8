"""What is waited counts once, and to no phase."""

import time
from types import SimpleNamespace

import pytest
from wait_clock import RolloutCosts, WaitClock


@pytest.fixture
def asleep(monkeypatch):
    """A function that lets time pass, and gives an answer; no other time passes."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(seconds, answer=None):
        now[0] += seconds
        return answer

    return pass_time


def test_what_is_waited_in_a_phase_is_not_counted_to_it(asleep):
    clock = WaitClock()
    gather = clock.waiting(asleep)
    with clock("update"):
        asleep(2.0)
        assert gather(10.0, answer=3) == 3
        asleep(1.0)
    gather(5.0)  # between phases
    assert clock.seconds == {"update": 3.0, "wait": 15.0}


def test_each_rollouts_phases_are_its_own_and_add_up(asleep):
    clock = WaitClock()
    noted = RolloutCosts(clock)
    for seconds in (3.0, 1.0):
        noted.on_epoch_begin(None, None, SimpleNamespace())
        with clock("rollout"):
            asleep(seconds)
        asleep(0.5)
        noted.on_epoch_end(None, None, SimpleNamespace())
    assert noted.costs == [{"rollout": seconds, "rest": 0.5, "total": seconds + 0.5} for seconds in (3.0, 1.0)]
