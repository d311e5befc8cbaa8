from collections import Counter

import pytest
import torch

from rl.step_probe import HALF_LIFE, Estimate, StepProbe, gain, windows

WEIGHTS = 64


def chunks(signal, noise, count, seed=0):
    """Gradients (count, WEIGHTS) of the mean square `signal` and, of the rest, `noise`."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(count, WEIGHTS, generator=generator) * (noise / WEIGHTS) ** 0.5
    return rest + (signal / WEIGHTS) ** 0.5


def trained(probe, rollouts, ratio_of, reach_of=lambda window: 1.0, seed=0, count=4):
    """Which windows are trained in so many rollouts, noise being 1 in all of them."""
    found = []
    for rollout in range(rollouts):
        found.append(probe.window)
        of_window = chunks(ratio_of(probe.window, rollout), 1.0, count, seed=1000 * seed + rollout)
        probe.learn((of_window / len(probe.window))[:, None].expand(-1, len(probe.window), -1), reach_of(probe.window))
    return found


def plain(steps, count):
    """A probe to which all windows cost the same."""
    return StepProbe(range(steps), count, chunks=4, cost=lambda window: 1.0)


def test_windows_begin_half_a_window_apart_and_reach_both_ends():
    assert windows(range(6), 3) == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert windows(range(6), 4) == [(0, 1, 2, 3), (2, 3, 4, 5)]
    assert windows(range(9), 4) == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (5, 6, 7, 8)]
    assert windows((3, 4, 5), 1) == [(3,), (4,), (5,)]
    assert windows((3, 4), 2) == [(3, 4)]


def test_estimates_are_those_of_the_distribution():
    found = Estimate.of(chunks(0.25, 4.0, 600))
    assert found.ratio == pytest.approx(0.25 / 4.0, abs=0.006)
    assert found.snr == pytest.approx(0.25, abs=0.012)
    assert Estimate(-0.04, 0.1).snr == pytest.approx(-0.2)


def test_an_estimate_is_by_hand():
    """Three chunks of squares 4, 4 and 1, whose inner products are 2, 0 and 1."""
    sketches = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3**0.5, 0.0], [0.0, 1 / 3**0.5, (2 / 3) ** 0.5]])
    found = Estimate.of(sketches)
    signal, noise = 1.0, 3.0 - 1.0
    assert found.ratio == pytest.approx(signal / noise)
    of_one = float(torch.tensor([2.0, 0.0, 1.0]).var()) / noise**2
    common = 6 / 9  # of the 9 pairs of two inner products (one and itself among them), those with one chunk in common
    assert found.variance == pytest.approx(of_one / 3 + common * (signal / noise) * of_one)


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 4), (0.02, 8), (0.05, 48), (0.25, 48)])
def test_an_estimate_has_no_bias_and_its_variance_is_that_of_its_spread(ratio, count):
    found = [Estimate.of(chunks(ratio, 1.0, count, seed)) for seed in range(600)]
    ratios = torch.tensor([one.ratio for one in found])
    told = float(torch.tensor([one.variance for one in found]).mean()) ** 0.5
    spread = float(ratios.std())
    assert float(ratios.mean()) == pytest.approx(ratio, abs=3.5 * spread / 600**0.5 + 0.02 * ratio)
    assert told == pytest.approx(spread, rel=0.15)


def test_gain_is_by_hand():
    """A signal of 4 beside a noise of 8, so a length of 12 ** 0.5: 4 / sqrt(4 + 8 / 2), times the rewards' std."""
    assert gain(ratio=0.5, reach=0.1 * 12**0.5, chunks=2) == pytest.approx(0.1 * 4.0 / (4.0 + 8.0 / 2) ** 0.5)
    assert gain(ratio=-0.1, reach=0.1, chunks=2) == 0


def test_promises_are_by_hand():
    """Of four windows first one and then a second one is known, by the same chunks."""
    probe, gradients = plain(4, 1), chunks(0.5, 1.0, 4)[:, None]
    one = Estimate.of(gradients[:, 0])
    error = one.variance**0.5
    probe.learn(gradients, reach=0.5)
    known = one.ratio / 2 + 2 * error / 2**0.5  # the mean of nothing and of what was measured, and two errors
    assert probe.promises() == pytest.approx([gain(known, 0.5, 4), gain(2 * error, 0.5, 4)])
    probe.window = (1,)
    probe.learn(gradients, reach=0.1)
    old = 0.5 ** (1 / HALF_LIFE)
    aged = one.ratio * old / (1 + old) + 2 * error / (1 + old) ** 0.5
    nearly = (0.1 * 0.5 + 0.1) / 1.1  # it hardly counts that the window before reaches farther
    expected = [gain(aged, 0.5, 4), gain(known, nearly, 4), gain(2 * error, nearly, 4)]
    assert probe.promises() == pytest.approx(expected)


def test_windows_are_tried_one_after_another_and_none_that_hardly_reaches_anything():
    probe = StepProbe(range(6), count=2, chunks=4, cost=lambda window: 3.0 - window[0] / 4)
    found = trained(probe, 60, lambda window, rollout: 0.0, lambda window: 0.1 ** window[0])
    assert found[0] == (0, 1)
    assert found.index((1, 2)) < found.index((2, 3))
    assert found.count((0, 1)) + found.count((1, 2)) > 50
    assert (4, 5) not in found


@pytest.mark.parametrize(("steps", "best"), [(5, 1), (19, 15)])
def test_the_window_that_learns_is_found_among_few_and_among_many(steps, best):
    probe = plain(steps, 2)
    found = trained(probe, 20 * steps, lambda window, rollout: 0.5 * (window[0] == best), count=16)
    assert Counter(found)[best, best + 1] > 10 * steps
    assert {(first, first + 1) for first in range(best)} < set(found)


def test_the_sums_signal_counts_not_its_steps():
    """Two steps that learn the same are worth more than two that undo each other."""
    probe, found = plain(3, 2), []
    for rollout in range(60):
        found.append(probe.window)
        first, second = chunks(0.5, 1.0, 8, seed=rollout), chunks(0.5, 1.0, 8, seed=100 + rollout)
        probe.learn(torch.stack([first, second if probe.window == (1, 2) else -second], dim=1), reach=1.0)
    assert Counter(found)[1, 2] > 45


def test_a_window_of_twice_the_gain_is_not_worth_thrice_the_time():
    ratios, found = {0: 0.4, 1: 0.2}, {}
    for dear in (1.0, 3.0):
        probe = StepProbe(range(2), count=1, chunks=4, cost=lambda window, dear=dear: dear if window == (0,) else 1.0)
        found[dear] = Counter(trained(probe, 60, lambda window, rollout: ratios[window[0]], count=16))
    assert found[1.0][0,] > 40
    assert found[3.0][1,] > 40


def test_where_nothing_is_told_apart_all_are_trained_those_of_more_reach_more_often():
    reaches = {0: 1.0, 1: 0.7, 2: 0.5, 3: 0.3, 4: 0.1}
    found = Counter()
    for seed in range(4):
        found.update(trained(plain(6, 2), 50, lambda window, rollout: 0.0, lambda window: reaches[window[0]], seed))
    counts = [found[first, first + 1] for first in range(5)]
    assert min(counts) > 0
    assert counts[0] > counts[2] > counts[4]
    assert counts[4] < 0.1 * sum(counts)


def test_what_was_measured_long_ago_is_forgotten():
    turn = 4 * HALF_LIFE

    def learns(rollout):
        return (0,) if rollout < turn else (2,)

    found = trained(plain(3, 1), 3 * turn, lambda window, rollout: 0.5 * (window == learns(rollout)), count=16)
    assert Counter(found[:turn])[0,] > turn / 2
    assert Counter(found[2 * turn :])[2,] > turn / 2


@pytest.mark.parametrize("value", [float("nan"), 0.0], ids=["float16 could not hold it", "no group differs"])
def test_an_update_may_tell_nothing(value):
    probe = plain(3, 1)
    assert probe.learn(torch.full((4, 1, WEIGHTS), value), reach=1.0) == {}
    assert probe.window == (0,)
    assert probe.state() == []


def test_each_step_has_its_own_ratio():
    found = plain(3, 2).learn(torch.stack([chunks(1.0, 1.0, 60), chunks(0.0, 1.0, 60, seed=1)], dim=1), reach=1.0)
    assert found[0] == pytest.approx(1.0, abs=0.1)
    assert found[1] == pytest.approx(0.0, abs=0.2)


def test_the_probe_comes_back_to_the_bit():
    probe, other = plain(4, 2), plain(4, 2)
    trained(probe, 5, lambda window, rollout: 0.1)
    other.load(probe.state(), probe.window)
    assert other.promises() == probe.promises()
    assert trained(other, 9, lambda window, rollout: 0.1, seed=1) == trained(probe, 9, lambda w, r: 0.1, seed=1)


def test_steps_that_are_no_window_are_chosen_anew():
    probe = plain(4, 2)
    probe.load([], (0, 3))
    assert probe.window == (0, 1)
