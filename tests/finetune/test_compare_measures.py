"""What a comparison's figures say, against closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from finetune.compare.measures import band, difference, holm, rank_of_worst, seeds_needed
from finetune.paired import Parts, variance_parts


def table(rng, seeds=4, prompts=50, mean=0.0, of_seeds=0.3, of_prompts=0.5, rest=1.0):
    return (
        mean
        + rng.normal(0, of_seeds, (seeds, 1))
        + rng.normal(0, of_prompts, (1, prompts))
        + rng.normal(0, rest, (seeds, prompts))
    )


def test_parts_of_variance_are_those_of_the_simulation():
    rng = np.random.default_rng(0)
    found = [variance_parts(table(rng, seeds=8, prompts=40)) for _ in range(300)]
    assert np.mean([one.rest for one in found]) == pytest.approx(1.0, rel=0.02)
    assert np.mean([one.prompts for one in found]) == pytest.approx(0.25, rel=0.05)
    assert np.mean([one.seeds for one in found]) == pytest.approx(0.09, rel=0.15)


def test_without_prompts_variance_it_is_the_t_test_of_the_seeds():
    """Where all prompts are alike, the seeds' means are all there is."""
    by_seed = np.array([0.1, 0.3, 0.2, 0.5])
    found = difference(np.repeat(by_seed[:, None], 20, axis=1))
    assert found.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


def test_without_seeds_variance_it_is_the_t_test_of_the_prompts():
    by_prompt = np.random.default_rng(1).normal(0.2, 1, 60)
    found = difference(np.repeat(by_prompt[None], 3, axis=0))
    assert found.p == pytest.approx(stats.ttest_1samp(by_prompt, 0).pvalue, rel=1e-6)


def test_of_nothing_five_in_a_hundred_are_shown_and_intervals_hold_it():
    """Three seeds, whose effects are as large as everything else together: the hard case of a bootstrap. The interval
    and the p-value never contradict each other."""
    rng = np.random.default_rng(0)
    found = [difference(table(rng, seeds=3, prompts=30, of_seeds=0.3)) for _ in range(300)]
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(0.05, abs=0.03)
    assert all((one.low <= 0 <= one.high) == (one.p >= 0.05) for one in found)


def test_fewer_than_three_seeds_have_no_interval():
    found = difference(np.ones((2, 5)))
    assert (found.value, found.low, found.high, found.p, found.more_seeds) == (1.0, None, None, None, None)
    mean, low, high = band(np.ones((2, 4, 5)))
    assert mean.tolist() == [1] * 4
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_nothing_differs_where_all_is_equal():
    assert difference(np.zeros((3, 5))).p == 1
    assert difference(np.ones((3, 5))).p == 0


def test_as_many_seeds_as_are_said_to_be_needed_show_it_four_times_in_five():
    parts, effect = Parts(seeds=0.04, prompts=0.0, rest=0.5, error=0.1, degrees=4), 0.15
    count = seeds_needed(parts, 50, effect)
    rng = np.random.default_rng(0)
    tables = [table(rng, count, 50, effect, 0.2, 0.0, 0.5**0.5) for _ in range(300)]
    shown = [difference(one).p < 0.05 for one in tables]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.07)
    assert seeds_needed(parts, 50, effect / 2) > 3 * count


def test_seeds_do_not_help_against_the_prompts():
    parts = Parts(seeds=0.0, prompts=1.0, rest=0.1, error=0.1, degrees=9)
    assert seeds_needed(parts, 10, 0.1) is None
    assert seeds_needed(parts, 10_000, 0.1) == 3
    assert seeds_needed(parts, 10, 0.0) is None


def test_more_seeds_are_counted_for_the_difference_that_matters():
    rng = np.random.default_rng(0)
    one = table(rng, seeds=4, prompts=30, mean=0.05, of_prompts=0.0)
    assert difference(one, smallest=1.0).more_seeds < difference(one, smallest=0.3).more_seeds


def test_holms_example():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_band_holds_each_looks_interval():
    rng = np.random.default_rng(0)
    tables = np.stack([table(rng, 4, 30, mean) for mean in (0.0, 0.5, 1.0)], axis=1)  # (S, L, P)
    mean, low, high = band(tables)
    for look in range(3):
        alone = difference(tables[:, look])
        assert mean[look] == pytest.approx(alone.value)
        assert (low[look], high[look]) == pytest.approx((alone.low, alone.high))


def test_the_worst_prompt_is_the_one_on_which_anybody_lost_most():
    change = np.array([[0.1, -0.3, 0.0], [0.2, 0.5, -0.9]])
    assert rank_of_worst(change, np.zeros((2, 3))).tolist() == [2, 1, 0]


def test_prompts_alike_in_the_picture_shown_are_ordered_by_all_pictures():
    """Yes or no of one picture says the same of many prompts."""
    change = np.array([[0.0, -1.0, -1.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    gains = np.array([[-0.9, 0.1, -0.4, 0.2], [0.0, 0.0, 0.0, -0.1]])
    assert rank_of_worst(change, gains).tolist() == [2, 1, 0, 3]
