import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, spearmanr

from reward.intervals import correlation_draws, draw_counts, figure, mean_draws, wilson, word_draws
from reward.metrics import word_metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_correlations_of_each_draw_agree_with_scipy(rng):
    said, true = rng.random(30).round(1), rng.random(30).round(1)
    drawn = correlation_draws(said, true, draws=4, seed=7)
    for draw, rows in enumerate(np.random.default_rng(7).integers(30, size=(4, 30))):
        assert drawn["plcc"][draw] == pytest.approx(pearsonr(said[rows], true[rows]).statistic)
        assert drawn["srcc"][draw] == pytest.approx(spearmanr(said[rows], true[rows]).statistic)


def test_constant_draws_correlate_with_nothing():
    drawn = correlation_draws(np.full(5, 0.3), np.linspace(0, 1, 5), draws=20)
    assert not drawn["plcc"].any()
    assert not drawn["srcc"].any()
    two = correlation_draws(np.array([0.0, 1.0]), np.array([0.0, 1.0]), draws=50)["plcc"]
    assert set(two.round(9)) == {0.0, 1.0}  # half of the draws hold one picture twice


def test_means_are_over_the_pictures_drawn_that_have_a_value():
    counts = np.array([[1.0, 1, 1], [0, 2, 1], [0, 3, 0]])
    assert mean_draws(np.array([2.0, np.nan, 4.0]), counts).tolist() == [3.0, 4.0]


def test_a_mean_has_the_interval_of_the_central_limit(rng):
    values = rng.normal(size=400)
    found = figure(values.mean(), mean_draws(values, draw_counts(400, 2000)), 400)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_words_of_a_draw_are_those_of_its_pictures():
    said, true = [[1, 0, 1], [0, 1], [1]], [[1, 1, 0], [0, 1], [0]]
    tallies = np.array([[1, 2, 2], [1, 1, 1], [0, 1, 0]])
    drawn = word_draws(tallies, np.array([[1, 1, 1], [0, 2, 1], [0, 0, 3]]))
    for draw, places in enumerate(([0, 1, 2], [1, 1, 2], [2, 2, 2])):
        expected = word_metrics([said[place] for place in places], [true[place] for place in places])
        assert {name: values[draw] for name, values in drawn.items()} == pytest.approx(expected)


def test_what_has_no_interval():
    assert figure(0.5, np.array([0.1, 0.2]), 1).low is None
    assert figure(0.5, np.empty(0), 9).high is None
    assert figure(0.5, np.empty(0), 0).value is None


def test_wilsons_interval():
    """As scipy's `binomtest(...).proportion_ci(method="wilson")` has it where nothing is tied."""
    for wins, count in ((17, 20), (10, 10), (0, 4)):
        assert wilson(wins / count, count) == pytest.approx(binomtest(wins, count).proportion_ci(method="wilson"))
