"""Against scipy's spearmanr, and against counts on a few fingers."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, spearmanr

from finetune import agreement_measures
from finetune.agreement_measures import (
    across_prompts,
    groups_of,
    noise_share,
    pair_accuracy,
    pair_accuracy_across,
    preference,
    rank_correlation,
    share_with_fellows,
    spread_within,
    within_prompts,
)
from finetune.small_changes import as_jpeg, shifted


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_rank_correlation_is_scipys(rng):
    values = rng.normal(size=(3, 40)).round(1)  # with ties
    np.testing.assert_allclose(rank_correlation(values), spearmanr(values.T).statistic, atol=1e-12)
    values[1] = 2.0
    assert np.isnan(rank_correlation(values)[1]).all()
    assert rank_correlation(values)[0, 2] == pytest.approx(spearmanr(values[0], values[2]).statistic)


def test_within_prompts_is_the_mean_over_prompts(rng):
    groups = groups_of([f"prompt {place % 6}" for place in range(30)])
    values = rng.normal(size=(2, 30))
    values[1, groups == 5] = 1.0  # this prompt tells nothing of the two
    each = [spearmanr(*values[:, groups == group]).statistic for group in range(5)]
    figures = within_prompts(values, groups)
    assert figures[0][1].value == pytest.approx(np.mean(each))
    assert figures[0][1].n == 5
    assert figures[0][0].value == pytest.approx(1)
    assert figures[0][1].low < figures[0][1].value < figures[0][1].high


def test_raters_who_agree_across_prompts_need_not_agree_within(rng):
    groups = np.repeat(np.arange(100), 4)
    hard = np.repeat(rng.normal(size=100), 4) * 10
    values = np.stack([hard + rng.normal(size=400), hard + rng.normal(size=400)])
    within, across = within_prompts(values, groups)[0][1], across_prompts(values, groups)[0][1]
    assert within.low < 0 < within.high
    assert across.low > 0.9
    assert across.value == pytest.approx(spearmanr(*values).statistic)


def test_the_interval_knows_that_pictures_of_a_prompt_are_not_independent(rng):
    values = np.repeat(rng.normal(size=(2, 40)), 10, axis=1)  # ten copies of each picture tell no more than one
    copies = across_prompts(values, np.repeat(np.arange(40), 10))[0][1]
    single = across_prompts(values[:, ::10], np.arange(40))[0][1]
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.05)


def test_one_picture_a_prompt_says_nothing_within(rng):
    groups = np.arange(10)
    assert within_prompts(rng.normal(size=(2, 10)), groups)[0][1].value is None
    assert pair_accuracy(rng.normal(size=10), rng.normal(size=10), groups).value is None


def test_pair_accuracy_counts_pairs():
    groups = np.array([0, 0, 0, 1, 1, 2])
    true = np.array([1.0, 2.0, 3.0, 5.0, 5.0, 9.0])
    said = np.array([0.1, 0.3, 0.3, 0.9, 0.2, 0.0])
    figure = pair_accuracy(said, true, groups)  # pairs 1<2, 1<3 right, 2<3 half; 5 = 5 counts not; the last is alone
    assert figure.value == pytest.approx(2.5 / 3)
    assert figure.n == 3
    assert pair_accuracy(-true, true, groups).value == 0
    assert pair_accuracy(true, true, groups).value == 1


def test_pair_accuracy_across_counts_pairs_of_all_pictures():
    true = np.array([1.0, 2.0, 3.0, 3.0, np.nan])
    said = np.array([0.1, 0.3, 0.3, 0.2, 0.0])
    figure = pair_accuracy_across(said, true, np.arange(5))  # 1 < 2, 1 < 3, 1 < 3 right; 2 < 3 half, and wrong
    assert figure.value == pytest.approx(3.5 / 5)
    assert figure.n == 5
    assert pair_accuracy_across(said, np.full(5, np.nan), np.arange(5)).value is None
    assert pair_accuracy_across(said, np.ones(5), np.arange(5)).n == 0
    groups = np.zeros(4, dtype=int)
    within, across = (one(said[:4], true[:4], groups) for one in (pair_accuracy, pair_accuracy_across))
    assert within == across, "of one prompt the pairs are the same, and there is no interval"


def test_the_interval_across_prompts_is_over_pictures_of_their_own_prompts(rng, monkeypatch):
    """Against the same by the definition: draw pictures again, and count the pairs of those drawn."""
    true, said = rng.normal(size=(2, 40))
    said += true
    figure = pair_accuracy_across(said, true, np.arange(40), draws=2000)
    drawn = []
    for _ in range(1000):
        places = rng.integers(40, size=40)
        better, preferred = (np.sign(one[places][:, None] - one[places]) for one in (true, said))
        drawn.append(((1 + better * preferred) / 2)[better != 0].mean())
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    monkeypatch.setattr(agreement_measures, "_BLOCK", 7 * 40)
    assert pair_accuracy_across(said, true, np.arange(40), draws=2000).low == pytest.approx(figure.low)
    copies = pair_accuracy_across(*np.repeat([said, true], 5, axis=1), np.repeat(np.arange(40), 5), draws=2000)
    assert copies.high - copies.low == pytest.approx(figure.high - figure.low, rel=0.05)
    right = pair_accuracy_across(true, true, np.arange(40))
    assert (right.value, right.low) == (1, pytest.approx(proportion_interval(40)))


def test_share_of_pictures_with_another_of_their_prompt():
    assert share_with_fellows(np.array([0, 1, 1, 2, 7, 7, 7, 3])) == 5 / 8
    assert share_with_fellows(np.arange(4)) == 0
    assert share_with_fellows(np.arange(0)) == 1


def test_of_one_prompt_there_are_no_intervals(rng):
    groups, values = np.zeros(8, dtype=int), rng.normal(size=(2, 8))
    for figure in (
        within_prompts(values, groups)[0][1],
        across_prompts(values, groups)[0][1],
        pair_accuracy(*values, groups),
        preference(*values, groups),
    ):
        assert figure.value is not None
        assert figure.low is figure.high is None


def test_prompts_that_all_say_the_same_leave_it_open_how_sure_that_is():
    groups, true = np.repeat(np.arange(6), 2), np.tile([1.0, 2.0], 6)
    figure = pair_accuracy(true, true, groups)
    assert (figure.value, figure.high, figure.n) == (1, 1, 6)
    assert figure.low == pytest.approx(proportion_interval(6))
    assert preference(np.zeros(12), np.ones(12), groups).high == pytest.approx(1 - proportion_interval(6))


def proportion_interval(count):
    """Wilson's lower end where all of `count` are right, by scipy."""
    return binomtest(count, count).proportion_ci(method="wilson").low


def test_the_interval_of_pair_accuracy_holds_chance(rng):
    groups = np.repeat(np.arange(200), 3)
    figure = pair_accuracy(rng.normal(size=600), rng.normal(size=600), groups)
    assert figure.low < 0.5 < figure.high
    assert 0.03 < figure.high - figure.low < 0.15


def test_noise_is_measured_against_the_spread_within_prompts(rng):
    groups = np.repeat(np.arange(500), 4)
    plain = np.repeat(rng.normal(size=500), 4) * 100 + rng.normal(size=2000) * 2
    assert spread_within(plain, groups) == pytest.approx(2, rel=0.05)
    changed = plain + 7 + rng.normal(size=2000) * 0.5  # what is common to all does not change the order
    assert noise_share(plain, changed, groups) == pytest.approx(0.25, rel=0.05)
    assert noise_share(np.ones(2000), np.ones(2000), groups) is None
    assert spread_within(plain[::4], np.arange(500)) == pytest.approx(plain[::4].std(ddof=1))


def test_small_changes_are_small_and_no_smaller():
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, size=(24, 40), mode="bilinear")
    compressed, moved = as_jpeg(images), shifted(images)
    assert compressed.shape == moved.shape == images.shape
    assert 0 < (compressed - images).abs().mean() < 0.02
    assert (as_jpeg(images, quality=5) - images).abs().mean() > (compressed - images).abs().mean()
    assert torch.equal(moved[..., 1:], images[..., :-1])
    assert torch.equal(moved[..., 0], images[..., 0])


def test_what_has_no_number_does_not_count(rng):
    """As if these pictures were not there, for the rater that has none; the others keep theirs."""
    groups, values = np.repeat(np.arange(5), 4), rng.normal(size=(3, 20))
    values[2, [0, 5, 6, 7, 19]] = np.nan
    there = np.isfinite(values[2])
    found, whole = rank_correlation(values), rank_correlation(values[:2])
    assert found[0, 1] == pytest.approx(whole[0, 1])
    assert found[0, 2] == found[2, 0] == pytest.approx(spearmanr(values[0][there], values[2][there]).statistic)
    within = within_prompts(values, groups)
    assert (within[0][1].n, within[0][2].n) == (5, 4), "the second prompt has one number left"
    assert pair_accuracy(values[0], values[2], groups) == pair_accuracy(
        values[0][there], values[2][there], groups[there]
    )
    assert spread_within(values[2], groups) == pytest.approx(spread_within(values[2][there], groups[there]))
