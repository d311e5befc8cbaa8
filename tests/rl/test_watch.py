"""When a monitor crosses its limit: what is said, what ends a run, and how seldom chance does."""

import json
import math

import numpy as np
import pytest
import torch

from rl.monitors import (
    agreement,
    paired_fall,
)
from rl.watch import ERRORS, WINDOW, Watch
from rl.watch_limits import MONITORS, check_watch


def test_a_crossing_is_said_once_and_again_after_a_recovery(caplog):
    watch, over = Watch({}), []
    for value in (10.0, 7.0, 5.0, 4.0, 9.0, 5.0):
        assert watch.observe({"drawn": value}) == {"drawn": value / 10}
        over.append(list(watch.over))
    assert over == [[], [], ["drawn"], ["drawn"], [], ["drawn"]]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "hold 50% of the edges they had at the start: the policy may be learning to draw less" in lines[0]
    assert "watch/drawn is 0.5, its limit 0.6" in lines[0]


def test_diversity_is_held_against_a_rollout_that_shared_as_much_noise():
    """Pictures from the same first steps are alike whatever the policy; a fall among such ones is one."""
    watch = Watch({}, speaks=False)
    shared = [[], [0, 1], [0, 1], [0, 1, 2], [0, 1], []]
    told = [1.0, 0.4, 0.38, 0.2, 0.2, 0.9]
    curve = [watch.observe({"diversity": value}, noise)["diversity"] for value, noise in zip(told, shared, strict=True)]
    assert curve == pytest.approx([1, 1, 0.95, 1, 0.5, 0.9])
    assert watch.crossed == ["diversity"]
    resumed = Watch({}, speaks=False)
    resumed.load_state(json.loads(json.dumps(watch.state())))
    assert resumed.observe({"diversity": 0.1}, [0, 1]) == {"diversity": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("name", "values", "over"),
    [
        ("drawn", (1, 1.66, 1.67), [False, False, True]),
        ("file_size", (100, 61, 59), [False, False, True]),
        ("diversity", (0.1, 0.071, 0.069, 0.5), [False, False, True, False]),
        ("map_entropy", (0.8, 0.57, 0.55, 1.0), [False, False, True, False]),
        ("kl", (0, 0.019, 0.021), [False, False, True]),
        ("saturation", (0.5, 0.51), [False, True]),
        ("dead_groups", (0.0, 0.5, 0.6), [False, False, True]),
        ("file_size", (0.0, 50.0), [False, False]),  # nothing was there to be lost
    ],
)
def test_default_limits(name, values, over):
    watch, found = Watch({}, speaks=False), []
    for value in values:
        watch.observe({name: value})
        found.append(watch.over == [name])
    assert found == over


def rollout(reward, held_out, error=0.05, spread=1.0):
    return {"reward": reward, "reward_error": 1e9, "reward_spread": 1.0, "held_out": held_out, "held_out_error": error,
            "held_out_spread": spread}  # fmt: skip


def test_held_out_counts_what_is_beyond_three_standard_errors():
    watch = Watch({}, speaks=False)
    watch.observe(rollout(0, 10, error=0.3, spread=2.0))
    curve = watch.observe(rollout(2, 6, error=0.4, spread=5.0))["held_out"]  # the spread is that of the start
    assert curve == pytest.approx((8 - 10) / 2)
    error = math.sqrt((0.3**2 + 0.4**2) / 2**2 + 0.3**2) / 2
    assert curve + 3 * error < -0.2
    assert watch.over == ["held_out"]
    for _ in range(WINDOW):
        curve = watch.observe(rollout(2, 8.72, error=0.0))["held_out"]
    assert curve == pytest.approx(-0.64)  # the first rollouts have left the window
    assert curve + 3 * 0.3 / 2 == pytest.approx(-0.19)
    assert not watch.over


def test_noise_of_small_rollouts_does_not_trip_the_held_out_reward():
    """100 runs of 30 rollouts of 8 prompts, in which the trained reward rises and the held-out one stays."""
    generator, tripped = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        watch, over = Watch({}, speaks=False), False
        for number in range(30):
            means = torch.randn(8, generator=generator)
            watch.observe(rollout(number, float(means.mean()), error=float(means.std() / 8**0.5), spread=1.4))
            over |= bool(watch.over)
        tripped += over
    assert tripped <= 3


def test_a_fall_is_found_within_the_window():
    watch = Watch({}, speaks=False)
    for number in range(WINDOW):
        watch.observe(rollout(number, 0.0))
    for number in range(WINDOW):
        watch.observe(rollout(WINDOW + number, -0.6))
    assert watch.over == ["held_out"]


def test_a_fall_with_the_trained_reward_is_no_gaming():
    watch = Watch({}, speaks=False)
    for number in range(10):
        watch.observe(rollout(-number, -number))
    assert not watch.over


def ours(reward, error=0.1, spread=2.0, **more):
    """Of a run without a held-out reward."""
    return {"reward": reward, "reward_error": error, "reward_spread": spread, **more}


def test_a_trained_reward_that_falls_beyond_its_noise_is_said():
    watch = Watch({}, speaks=False)
    watch.observe(ours(1.0, error=0.0))
    assert watch.observe(ours(-0.2, error=0.2))["reward"] == pytest.approx(-0.3)
    assert not watch.over  # three errors of 0.2 / 2 / 2 are half of it
    assert watch.observe(ours(-0.2, error=0.2))["reward"] == pytest.approx(-0.4)
    assert watch.over == ["reward"]  # -0.4 + 3 * (2 * 0.2^2)^0.5 / 3 / 2 < -0.2


def test_agreement_counts_by_the_worst_window_beyond_its_error():
    """Four rollouts of agreement, then of -0.5: the last one alone says enough."""
    watch, error = Watch({}, speaks=False), 0.16
    for _ in range(4):
        watch.observe(ours(0.0, agreement=0.6, agreement_error=error))
    curve = watch.observe(ours(0.0, agreement=-0.5, agreement_error=error))["agreement"]
    assert curve == pytest.approx((4 * 0.6 - 0.5) / WINDOW)
    assert -0.5 + ERRORS * error < 0 < curve
    assert watch.over == ["agreement"]
    slow = Watch({}, speaks=False)
    for count in range(1, WINDOW + 1):  # each too little by itself
        slow.observe(ours(0.0, agreement=-0.3, agreement_error=error))
        assert (slow.over == ["agreement"]) == (-0.3 + ERRORS * error / count**0.5 < 0)
    assert slow.over


def test_rewards_that_have_nothing_to_do_with_each_other_seldom_disagree():
    """100 runs of 30 rollouts of 8 prompts with 4 pictures."""
    generator, tripped = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        watch, over = Watch({}, speaks=False), False
        for _ in range(30):
            value, error = agreement(*torch.randn(2, 32, generator=generator), 4)
            watch.observe(ours(0.0, agreement=value, agreement_error=error))
            over |= bool(watch.over)
        tripped += over
    assert tripped <= 10


def test_evaluations_are_compared_in_pairs_with_the_first():
    watch = Watch({}, speaks=False)
    start = {"reward": [0.1, 0.9, 0.5, 0.4], "held_out": [1.0, 2.0, 3.0, 4.0]}
    assert watch.observe_evaluation(start) == {"evaluated": 0.0}
    fallen = [one - change for one, change in zip(start["held_out"], (0.10, 0.11, 0.09, 0.10), strict=True)]
    rest = Watch({}, speaks=False)
    rest.load_state(json.loads(json.dumps(watch.state())))
    for one in (watch, rest):
        found = one.observe_evaluation(start | {"held_out": fallen})["evaluated"]
        assert found == paired_fall(start["held_out"], fallen)
        assert one.over == ["evaluated"]
        one.observe_evaluation(start)
        assert (one.over, one.crossed) == ([], ["evaluated"])
    assert Watch({}).observe_evaluation({"reward": [0.5]}) == {}  # one prompt tells nothing


def test_evaluations_are_compared_with_the_best_one_too():
    """What rises and falls again is seen before it is below the start, a little later for the choice among many."""
    watch = Watch({}, speaks=False)
    noise = np.random.default_rng(0).normal(size=(5, 50))
    levels = (0.0, 1.0, 2.0, 1.9, 1.0)
    seen = [(level + 0.5 * row).tolist() for level, row in zip(levels, noise, strict=True)]
    found = [watch.observe_evaluation({"reward": values})["evaluated"] for values in seen]
    assert min(found[:3]) == 0
    assert found[4] == paired_fall(seen[2], seen[4], choices=4) > paired_fall(seen[2], seen[4])
    assert watch.over == ["evaluated"]
    assert paired_fall(seen[2], seen[3], choices=10**6) == 0


def test_this_process_own_evaluation_before_training_comes_before_a_checkpoints():
    """It is of the same prompts, also where the run goes on with others, or with a held-out reward that is new."""
    part, rest = Watch({}, speaks=False), Watch({}, speaks=False)
    part.observe_evaluation({"reward": [0.1, 0.2, 0.3]})
    rest.observe_evaluation({"reward": [0.8, 0.9, 0.7], "held_out": [1.0, 2.0, 3.0]})
    rest.load_state(part.state())
    fallen = {"reward": [0.8, 0.9, 0.7], "held_out": [0.5, 1.51, 2.49]}
    assert rest.observe_evaluation(fallen)["evaluated"] == paired_fall([1.0, 2.0, 3.0], fallen["held_out"])


def test_a_run_goes_on_with_a_held_out_reward_that_it_had_not():
    part, rest = Watch({}, speaks=False), Watch({}, speaks=False)
    part.observe(ours(0.0))
    rest.load_state(part.state())
    assert rest.observe(ours(0.0) | rollout(0.0, 5.0) | {"agreement": 0.5, "agreement_error": 0.1})["agreement"] == 0.5
    assert rest.observe(rollout(1.0, 4.0, error=0.0) | ours(1.0))["held_out"] == pytest.approx(-0.5)


def test_what_was_known_does_not_change_with_what_is_learned():
    """A rollout that is cut short is gone through again from what was known before it."""
    watch = Watch({}, ["drawn"], speaks=False)
    watch.observe(ours(0.0, drawn=1.0))
    watch.observe_evaluation({"reward": [0.0, 1.0]})
    known = watch.state()
    told = json.dumps(known)
    watch.observe(ours(0.0, drawn=0.1))
    watch.observe_evaluation({"reward": [0.0, 0.5]})
    assert json.dumps(known) == told


def test_limits_may_be_moved_or_taken_away_and_curves_stay():
    watch = Watch({"drawn": 0.9, "kl": None}, speaks=False)
    watch.observe({"drawn": 1.0})
    assert watch.observe({"drawn": 0.85, "kl": 99.0}) == {"drawn": 0.85, "kl": 99.0}
    assert watch.over == ["drawn"]


def test_only_what_is_named_stops():
    for stop_on, stopping in (([], []), (["kl"], ["kl"]), (["all"], ["drawn", "kl"])):
        watch = Watch({}, stop_on, speaks=False)
        watch.observe({"drawn": 1.0})
        watch.observe({"drawn": 0.1, "kl": 1.0})
        assert watch.stopping == stopping


def test_who_does_not_speak_says_nothing(caplog):
    Watch({}, speaks=False).observe({"kl": 1.0})
    assert not caplog.text


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_resumed_watch_is_the_uninterrupted_one_to_the_bit(cut, caplog):
    generator = torch.Generator().manual_seed(1)
    shown = [
        {
            name: float(torch.rand(1, generator=generator) + 0.1)
            for name in (*MONITORS, *rollout(0, 0), "agreement_error")
        }
        for _ in range(8)
    ]
    whole, part, rest = Watch({}), Watch({}, speaks=False), Watch({})
    curves = [whole.observe(measured) for measured in shown]
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    for measured in shown[:cut]:
        part.observe(measured)
    part.note_checkpoint(cut, 0.1)
    rest.load_state(json.loads(json.dumps(part.state())))
    assert [rest.observe(measured) for measured in shown[cut:]] == curves[cut:]
    assert (rest.over, rest.best) == (whole.over, {"global_step": cut, "held_out": 0.1})
    again = [record.getMessage() for record in caplog.records]
    assert again == said[len(said) - len(again) :]


def test_the_best_checkpoint_is_the_first_of_the_best():
    watch = Watch({})
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
        watch.note_checkpoint(step, value)
    assert watch.best == {"global_step": 2, "held_out": 0.7}


def test_an_evaluation_chooses_among_checkpoints_and_a_rollout_only_without_one():
    """Rollouts from 1 .. 4 find more and more; evaluations, made of 2 and 4, find 4 worse."""
    watch, best = Watch({}, speaks=False), []
    for step, drawn, evaluated in ((1, 0.1, None), (2, 0.2, 0.6), (3, 0.3, None), (4, 0.4, 0.5)):
        if evaluated is not None:
            watch.observe_evaluation({"reward": [0.0, 0.0], "held_out": [evaluated - 0.1, evaluated + 0.1]}, step)
        rest = Watch({}, speaks=False)
        rest.load_state(json.loads(json.dumps(watch.state())))
        watch = rest
        watch.note_checkpoint(step, drawn)
        best.append(watch.best)
    assert (
        best
        == [{"global_step": 1, "held_out": 0.1}]
        + [{"global_step": 2, "held_out": pytest.approx(0.6), "evaluated": True}] * 3
    )


@pytest.mark.parametrize(
    ("limits", "stop_on", "message"),
    [
        ({"drawm": 0.5}, [], "watch_limits: there is no monitor 'drawm' .nearest name: 'drawn'.; there are held_out, "),
        ({}, ["diversty"], "stop_on: there is no monitor 'diversty' .nearest name: 'diversity'"),
        ({"kl": None}, ["kl"], "stop_on names 'kl', which has no limit; give it one in watch_limits"),
        ({"kl": "far"}, [], "limit of kl is 'far'; give a number between 0 and inf"),
        ({"kl": float("nan")}, [], "limit of kl is nan"),
        ({"kl": True}, [], "limit of kl is True"),
        ({"held_out": 0.2}, [], "limit of held_out is 0.2; give a number between -inf and 0"),
        ({"drawn": 1.5}, [], "limit of drawn is 1.5; give a number between 0 and 1"),
    ],
)
def test_settings_that_are_none(make_args, limits, stop_on, message):
    with pytest.raises(ValueError, match=message):
        make_args(watch_limits=limits, stop_on=stop_on)


def test_settings_that_are_fine():
    check_watch({"kl": None, "drawn": 0.9}, ["all"])
    check_watch({name: monitor.limit for name, monitor in MONITORS.items()}, list(MONITORS))


def test_a_run_that_went_on_with_other_limits_is_judged_by_them():
    part, rest = Watch({"kl": 0.1}, ["kl"], speaks=False), Watch({"kl": 0.3}, ["kl"], speaks=False)
    part.observe({"drawn": 1.0, "kl": 0.2})
    assert part.stopping == ["kl"]
    rest.load_state(part.state())
    assert not rest.stopping


def test_only_what_may_end_the_run_unmakes_a_sound_checkpoint():
    for stop_on, best in (([], {"global_step": 1}), (["drawn"], {"global_step": 2}), (["kl"], {"global_step": 1})):
        watch = Watch({}, stop_on, speaks=False)
        for step, kl in ((1, 0.0), (2, 1.0)):
            watch.observe({"drawn": 1.0, "kl": kl})
            watch.note_checkpoint(step)
        assert watch.best == best
