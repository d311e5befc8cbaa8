from collections import Counter

import pytest
import torch

from rl.step_probe import MEMORY, Estimate, StepProbe, _error, gain, windows

WEIGHTS = 64


def chunks(signal, noise, count, seed=0):
    """Gradients (count, WEIGHTS) of the mean square `signal` and, of the rest, `noise`."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(count, WEIGHTS, generator=generator) * (noise / WEIGHTS) ** 0.5
    return rest + (signal / WEIGHTS) ** 0.5


def trained(probe, rollouts, ratio_of, spread_of=lambda window: 1.0, seed=0):
    """Which windows are trained in so many rollouts of 4 chunks, noise being 1 in all of them."""
    found = []
    for rollout in range(rollouts):
        found.append(probe.window)
        of_window = chunks(ratio_of(probe.window, rollout), 1.0, 4, seed=1000 * seed + rollout)
        probe.learn((of_window / len(probe.window))[:, None].expand(-1, len(probe.window), -1), spread_of(probe.window))
    return found


def test_windows_begin_half_a_window_apart_and_reach_both_ends():
    assert windows(range(6), 3) == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert windows(range(6), 4) == [(0, 1, 2, 3), (2, 3, 4, 5)]
    assert windows(range(9), 4) == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (5, 6, 7, 8)]
    assert windows((3, 4, 5), 1) == [(3,), (4,), (5,)]
    assert windows((3, 4), 2) == [(3, 4)]


def test_estimates_are_those_of_the_distribution():
    found = Estimate.of(chunks(0.25, 4.0, 600))
    assert found.signal == pytest.approx(0.25, abs=0.03)
    assert found.noise == pytest.approx(4.0, abs=0.15)
    assert found.snr == pytest.approx(0.25, abs=0.02)
    assert found.pairs == 600 * 599 // 2


def test_the_error_of_a_ratio_is_its_spread_and_there_is_no_bias():
    found = [Estimate.of(chunks(0.02, 1.0, 8, seed)) for seed in range(400)]
    ratios = torch.tensor([one.signal / one.noise for one in found])
    told = torch.tensor([_error([one]) / one.pairs**0.5 for one in found])
    assert float(told.mean()) == pytest.approx(float(ratios.std()), rel=0.15)
    assert float(torch.tensor([one.signal for one in found]).mean()) == pytest.approx(0.02, abs=3 * 0.025 / 400**0.5)


def test_gain_is_by_hand():
    """A signal of 4 beside a noise of 8: 4 / sqrt(4 + 8 / 2), over the root of the noise."""
    assert gain(ratio=0.5, spread=0.1, chunks=2) == pytest.approx(0.1 * 4.0 / (4.0 + 8.0 / 2) ** 0.5 / 8.0**0.5)
    assert gain(ratio=-0.1, spread=0.1, chunks=2) == 0


def test_promises_are_by_hand():
    """Of four windows the first one is known, from two chunks whose inner product is 4 and whose squares are 5."""
    probe = StepProbe(range(4), count=1, chunks=4, cost=lambda window: 1.0)
    probe.learn(torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]]), spread=0.5)
    ratio, error = 4.0 / (5.0 - 4.0), 4.0 / (5.0 - 4.0)  # of one pair
    known, unknown = (ratio + 2 * error * 2**0.5) / 2, 2 * error  # half the ratio, two errors over the root of 2 pairs
    assert probe.promises() == pytest.approx([gain(known, 0.5, 4), gain(unknown, 0.5, 4)])
    probe.window = (1,)
    probe.learn(torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]]), spread=0.1)
    assert probe.promises() == pytest.approx([gain(known, 0.5, 4), gain(known, 0.1, 4), gain(unknown, 0.1, 4)])


def test_windows_are_tried_one_after_another_and_none_that_decides_next_to_nothing():
    probe = StepProbe(range(6), count=2, chunks=4, cost=lambda window: 3.0 - window[0] / 4)
    found = trained(probe, 60, lambda window, rollout: 0.0, lambda window: 0.1 ** window[0])
    assert found[0] == (0, 1)
    assert found.index((1, 2)) < found.index((2, 3))
    assert found.count((0, 1)) + found.count((1, 2)) > 50
    assert (4, 5) not in found


def test_the_window_that_learns_is_found():
    ratios = {0: 0.02, 1: 0.5, 2: 0.0, 3: 0.0}
    probe = StepProbe(range(5), count=2, chunks=4, cost=lambda window: 1.0)
    found = Counter(trained(probe, 40, lambda window, rollout: ratios[window[0]]))
    assert found[1, 2] >= 25


def test_the_sums_signal_counts_not_its_steps():
    """Two steps that learn the same are worth more than two that undo each other."""
    probe = StepProbe(range(3), count=2, chunks=4, cost=lambda window: 1.0)
    found = []
    for rollout in range(30):
        found.append(probe.window)
        first, second = chunks(0.5, 1.0, 4, seed=rollout), chunks(0.5, 1.0, 4, seed=100 + rollout)
        probe.learn(torch.stack([first, second if probe.window == (1, 2) else -second], dim=1), spread=1.0)
    assert Counter(found)[1, 2] > 20


def test_a_window_of_twice_the_gain_is_not_worth_thrice_the_time():
    ratios = {0: 0.4, 1: 0.2}
    found = {}
    for dear in (1.0, 3.0):
        probe = StepProbe(range(2), count=1, chunks=4, cost=lambda window, dear=dear: dear if window == (0,) else 1.0)
        found[dear] = Counter(trained(probe, 40, lambda window, rollout: ratios[window[0]]))
    assert found[1.0][0,] > 25
    assert found[3.0][1,] > 25


def test_where_nothing_is_told_apart_all_are_trained_those_more_that_change_more_of_the_reward():
    spreads = {0: 1.0, 1: 0.7, 2: 0.5, 3: 0.3, 4: 0.1}
    found = Counter()
    for seed in range(4):
        probe = StepProbe(range(6), count=2, chunks=4, cost=lambda window: 1.0)
        found.update(trained(probe, 50, lambda window, rollout: 0.0, lambda window: spreads[window[0]], seed))
    counts = [found[first, first + 1] for first in range(5)]
    assert min(counts) > 0
    assert counts[0] > counts[2] > counts[4]
    assert counts[4] < 0.1 * sum(counts)


def test_what_was_measured_long_ago_is_forgotten():
    probe = StepProbe(range(3), count=1, chunks=4, cost=lambda window: 1.0)
    found = trained(
        probe, 4 * MEMORY, lambda window, rollout: 0.5 * (window == ((0,) if rollout < 2 * MEMORY else (2,)))
    )
    assert Counter(found[: 2 * MEMORY]).most_common(1)[0][0] == (0,)
    assert Counter(found[3 * MEMORY :]).most_common(1)[0][0] == (2,)


def test_an_update_that_float16_could_not_hold_tells_nothing():
    probe = StepProbe(range(3), count=1, chunks=4, cost=lambda window: 1.0)
    probe.learn(torch.full((4, 1, WEIGHTS), float("nan")), spread=1.0)
    assert probe.window == (0,)
    assert probe.state() == {}


def test_the_probe_comes_back_to_the_bit():
    probe = StepProbe(range(4), count=2, chunks=4, cost=len)
    trained(probe, 5, lambda window, rollout: 0.1)
    other = StepProbe(range(4), count=2, chunks=4, cost=len)
    other.load(probe.state(), probe.window)
    assert other.promises() == probe.promises()
    assert trained(other, 9, lambda window, rollout: 0.1, seed=1) == trained(probe, 9, lambda w, r: 0.1, seed=1)
    assert StepProbe(range(4), count=2, chunks=4, cost=len).state() == {}
