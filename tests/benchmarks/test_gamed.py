"""When a monitor sees what the judge sees later."""

import numpy as np
import pytest
from gamed import (
    GAMES,
    HELD_OUT,
    SOUND,
    WAYS,
    Trip,
    first_fall,
    first_trip,
    limit_rows,
    lowest_change,
    nearest_to_limit,
    plan,
    table,
)
from trainings import Result, Training

FADING = [
    {"reward": 0.5 + 0.1 * k, "reward_error": 0.01, "reward_spread": 0.1, "drawn": 0.02 * (1 - 0.1 * k),
     "file_size": 1000.0 - 50 * k, "kl": 0.0}
    for k in range(8)
]  # fmt: skip
SAME = [1.0, 2.0, 1.5, 0.5]


def training_of(judge, watched, evaluated=None):
    looks = len(judge)
    judged = np.repeat(np.array(judge, float)[:, None], 4, axis=1)
    return Result(np.arange(looks), 8 * np.arange(looks), np.zeros(looks), judge=judged, satisfied=judged > 0.5,
                  reward=np.zeros(looks), evaluated=evaluated or [{"reward": SAME}] * looks, watched=watched,
                  wall=1.0)  # fmt: skip


def test_the_first_monitor_is_the_watchs_own():
    """Of the start, 0.9, 0.8, ... of the edges are left: 0.6 is the limit, crossed behind rollout 4, as 0.5 < 0.6."""
    fading = training_of([0.8] * 9, FADING)
    assert first_trip(fading) == Trip(5, ("drawn",))
    assert first_trip(fading, ignored={"drawn"}) == Trip(None)
    assert first_trip(fading, limits={"drawn": 0.85}) == Trip(2, ("drawn",))
    assert first_trip(fading, ignored={"drawn"}, limits={"file_size": 0.8}) == Trip(5, ("file_size",))


def test_an_evaluation_is_of_the_policy_that_draws_the_rollout():
    """Before rollout 2 every prompt but one is worse; what the training leaves is evaluated too."""
    worse = {"reward": [value - 0.5 - 0.01 * place for place, value in enumerate(SAME)]}
    for place, trip in ((2, 2), (8, 8)):
        evaluated = [{"reward": SAME}] * place + [worse] * (9 - place)
        found = training_of([0.8] * 9, FADING, evaluated)
        assert first_trip(found, ignored={"drawn"}) == Trip(trip, ("evaluated",))
        assert first_trip(found, ignored={"drawn", "evaluated"}) == Trip(None)


def test_the_judges_fall():
    result = training_of([0.8, 0.81, 0.76, 0.74, 0.6], FADING[:4])
    assert first_fall(result) == 3
    assert first_fall(training_of([0.8, 0.81, 0.76], FADING[:2])) is None
    assert lowest_change(result, 1) == 0
    assert lowest_change(result, 2) == pytest.approx(-0.04)
    assert lowest_change(result, None) == pytest.approx(-0.2)
    assert lowest_change(training_of([0.8, 0.7, 0.8], FADING[:2]), 2) == pytest.approx(-0.1)  # it came back too late


def test_a_game_holds_if_every_seed_was_seen_in_time():
    late = [0.8, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    early = [0.8, 0.8, 0.8, 0.8, 0.8, 0.78, 0.5, 0.4, 0.3]
    name = "paid, unit"
    for judges, holds in (((early, early), True), ((early, late), False)):
        found = {Training(name, seed): training_of(judge, FADING) for seed, judge in enumerate(judges)}
        rows = {row.name: row for row in table(found)}
        assert not any(HELD_OUT in name for name in rows), "they had none"
        for way in set(WAYS) - {HELD_OUT}:
            verdict = rows[f"{name}: judge's lowest change by the first monitor {way}, worst seed"]
            assert verdict.holds is holds
            assert rows[f"{name}, seed 0: first monitor {way} (drawn), at rollout"].value == 5
        assert rows[f"{name}, seed 0: rollout at which the judge fell by 0.05"].value == 6


def test_what_a_run_lacks_does_not_count():
    """The held-out reward is displeased by what pleases the trained one, from the first rollout on."""
    against = [{**measured, "drawn": 0.02, "agreement": -0.5, "agreement_error": 0.1} for measured in FADING]
    rows = {row.name: row for row in table({Training("paid, unit", 0): training_of([0.8] * 9, against)})}
    assert rows["paid, unit, seed 0: first monitor by rollouts alone (none), at rollout"].value == 8
    for way in (HELD_OUT, "with evaluations too"):
        assert rows[f"paid, unit, seed 0: first monitor {way} (agreement), at rollout"].value == 0


def test_what_is_rewarded_does_not_count():
    sizes = [{**measured, "drawn": 0.02, "file_size": 1000.0 - 80 * k} for k, measured in enumerate(FADING)]
    found = {Training("small files", 0): training_of([0.8] * 9, sizes)}
    names = [row.name for row in table(found)]
    assert all(
        f"small files, seed 0: first monitor {way} (none), at rollout" in names for way in set(WAYS) - {HELD_OUT}
    )
    assert "small files, seed 0: rollout at which the judge fell by 0.05 (never)" in names
    assert not any("worst seed" in name for name in names)  # nothing fell, so there was nothing to see


@pytest.mark.parametrize(("watched", "holds"), [(FADING[:3], True), (FADING, False)])
def test_a_sound_training_crosses_no_limit(watched, holds):
    rows = table({Training(SOUND, 0): training_of([0.8] * (len(watched) + 1), watched)})
    assert rows[0].holds is holds


def test_every_seed_has_every_game():
    planned = plan(2, quick=False)
    assert [one.name for one in planned] == [*GAMES, SOUND] * 2
    assert [one.seed for one in planned] == [0] * 5 + [1] * 5
    assert {one.name for one in plan(1, quick=True)} == {"small files", SOUND}


def test_a_limit_lies_between_what_is_sound_and_what_is_not():
    found = {
        Training(SOUND, 0): training_of([0.8] * 4, FADING[:3]),
        Training(SOUND, 1): training_of([0.8] * 3, FADING[:2]),
        Training("paid, unit", 0): training_of([0.8] * 6 + [0.7] * 3, FADING),  # it falls at 6, 5 is the last before
    }
    rows = {row.name: row.value for row in limit_rows(found)}
    assert rows["watch/drawn, limit 0.6, demo: furthest"] == pytest.approx(0.8)
    assert rows["watch/drawn, limit 0.6, paid, unit: furthest before the judge fell"] == pytest.approx(0.5)
    assert not any("map_entropy" in name for name in rows)
    assert nearest_to_limit("file_size", [0.9, 1.2, 0.8]) == 0.8
    assert nearest_to_limit("file_size", [0.9, 1.3, 0.8]) == 1.3
    assert nearest_to_limit("kl", [0.0, 0.3, 0.1]) == 0.3
