"""Intervals over seeds and prompts, against closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from finetune.paired import paired_interval, paired_ratio, variance_parts


def table(rng, seeds=3, prompts=64, mean=0.0, of_seeds=0.0, of_prompts=0.0, rest=1.0):
    cells = mean + rng.normal(0, rest, (seeds, prompts))
    return cells + rng.normal(0, 1, (seeds, 1)) * of_seeds + rng.normal(0, 1, (1, prompts)) * of_prompts


def test_one_seed_is_the_t_test_of_the_prompts():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = paired_interval([differences])
    assert found[0] == pytest.approx(differences.mean())
    assert found[1:] == pytest.approx(stats.ttest_1samp(differences, 0).confidence_interval(0.95))


def test_where_prompts_are_alike_it_is_the_t_test_of_the_seeds_means():
    rng = np.random.default_rng(0)
    cells = table(rng, seeds=4)
    cells -= cells.mean(axis=0) - cells.mean()  # no prompt is easier than another
    assert paired_interval(cells)[1:] == pytest.approx(stats.ttest_1samp(cells.mean(axis=1), 0).confidence_interval())


@pytest.mark.parametrize(
    "parts",
    [{}, {"of_prompts": 1.0}, {"of_seeds": 0.1}, {"of_seeds": 0.1, "of_prompts": 1.0}, {"of_seeds": 1.0}],
    ids=["cells alone", "prompts", "seeds", "both", "seeds alone matter"],
)
def test_intervals_hold_the_truth_nineteen_times_in_twenty(parts):
    """Three seeds, whatever differs: by chance 0.95 is missed by 0.015 (two standard errors)."""
    rng = np.random.default_rng(1)
    found = [paired_interval(table(rng, **parts)) for _ in range(800)]
    assert np.mean([low <= 0 <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.025)


def test_nothing_differs_in_a_table_of_one_value():
    assert paired_interval(np.full((3, 5), 0.25)) == (0.25, 0.25, 0.25)
    assert variance_parts(np.zeros((3, 5))).error == 0


def test_a_ratio_is_bounded_by_fiellers_formula():
    """One seed: the roots of the quadratic equation for the ratio of two means of pairs."""
    rng = np.random.default_rng(2)
    below = rng.normal(2.0, 1.0, 100)
    above = 0.5 * below + rng.normal(0, 0.5, 100)
    a, b = above.mean(), below.mean()
    (va, c), (_, vb) = np.cov(above, below) / 100
    t2 = stats.t.ppf(0.975, 99) ** 2
    roots = np.sort(np.roots([b**2 - t2 * vb, -2 * (a * b - t2 * c), a**2 - t2 * va]))
    assert paired_ratio([above], [below]) == pytest.approx((a / b, *roots))


def test_ratios_hold_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(3)
    held = []
    for _ in range(200):
        prompts = 0.3 * rng.normal(size=64)
        above, below = (
            scale * prompts + table(rng, mean=mean, of_seeds=0.03, rest=0.3) for scale, mean in ((1.0, 0.4), (0.5, 0.5))
        )
        _, low, high = paired_ratio(above, below)
        held.append(low <= 0.8 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)


def test_a_ratio_to_what_may_be_nothing_has_no_end():
    rng = np.random.default_rng(4)
    _, low, high = paired_ratio(table(rng, mean=1.0), table(rng, mean=0.05))
    assert np.isinf([low, high]).any()
    assert paired_ratio(np.full((2, 3), 2.0), np.full((2, 3), 4.0)) == (0.5, 0.5, 0.5)
    ratio, low, high = paired_ratio(np.ones((2, 3)), np.zeros((2, 3)))
    assert np.isnan(ratio)
    assert (low, high) == (-np.inf, np.inf)
