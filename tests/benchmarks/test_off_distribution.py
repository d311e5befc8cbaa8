"""Shares of the test split's correlation, and what is rated too high, where pencil and paper tell them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from off_distribution import LEAST, Judged, excess_rows, score_rows

from reward.feedback import SCORES

RANKS = np.arange(40) / 40


def judged(*said, true=RANKS, flaws=()):
    """Pictures whose judge says `true` of every score, and each predictor what `said` has for it."""
    pictures = object.__new__(Judged)
    pictures.verdicts = [SimpleNamespace(scores=dict.fromkeys(SCORES, value), flaws=set(flaws)) for value in true]
    pictures.said = [SimpleNamespace(scores=dict.fromkeys(SCORES, torch.tensor(values))) for values in said]
    return pictures


def test_shares_of_one_predictor_are_over_pictures_and_of_several_over_seeds():
    half = RANKS.copy()
    half[::2] = half[::2][::-1]  # some are ranked wrongly
    own = np.corrcoef(half, RANKS)[0, 1]  # of ranks, so Spearman's
    one = {row.name: row for row in score_rows("overall", judged(RANKS), {"elsewhere": judged(half)})}
    share = one["SRCC overall, elsewhere, of the test split's"]
    assert share.value == pytest.approx(own)
    assert share.low < share.value < share.high
    assert (share.n, share.holds) == (40, own >= 0.8)

    two = score_rows("overall", judged(RANKS, half), {"elsewhere": judged(half, half)})
    split, share = two
    assert split.value == pytest.approx((1 + own) / 2)
    assert share.value == pytest.approx((own + 1) / 2)
    # Student's quantile of one degree of freedom, times the standard error of two values.
    assert share.high - share.value == pytest.approx(12.7062 * (1 - own) / 2, rel=1e-4)
    assert share.n == 2


def test_what_is_rated_too_high_is_told_by_kind_of_flaw():
    found = {"base": judged(RANKS + 0.1, RANKS + 0.3, flaws=["malformed"])}
    (row,) = excess_rows("malformed", found)
    assert row.value == pytest.approx(0.2)
    assert row.n == 2
    (row,) = excess_rows("malformed", {"base": judged(RANKS + 0.1, flaws=["malformed"])})
    assert (row.value, row.low, row.high) == pytest.approx((0.1, 0.1, 0.1))
    assert excess_rows("colour", found) == []
    few = judged(RANKS[: LEAST - 1], true=RANKS[: LEAST - 1], flaws=["malformed"])
    assert excess_rows("malformed", {"base": few}) == []
