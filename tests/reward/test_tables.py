import numpy as np
import pytest

from reward.feedback import HEATMAPS, SCORES
from reward.fresh_raters import best_share
from reward.metrics import average_map_metrics, map_metrics, word_metrics
from reward.tables import (
    MAP_METRICS,
    Estimate,
    Estimates,
    Row,
    Said,
    Truth,
    estimates_of,
    figures_of,
    markdown,
    metric_columns,
    published_rows,
    share_row,
)

WORD_METRICS = ("precision", "recall", "f1")


@pytest.fixture
def case():
    """20 pictures with random scores, maps (every third one empty) and words, and random sayings of them."""
    rng = np.random.default_rng(0)
    true = rng.random((20, 6, 6)) * (np.arange(20) % 3 > 0)[:, None, None] * (rng.random((20, 6, 6)) < 0.3)
    rows = [map_metrics(p, t) for p, t in zip(rng.random((20, 6, 6)), true, strict=True)]
    words = [[list(rng.integers(0, 2, 3)) for _ in range(20)] for _ in range(2)]
    said = Said({name: metric_columns(rows) for name in HEATMAPS}, rng.random((20, 4)), words[0])
    return said, Truth(rng.random((20, 4)), words[1]), rows


def test_figures_are_the_metrics_of_the_pictures_chosen(case):
    said, truth, rows = case
    places = [1, 3, 4, 6, 11]
    row = figures_of(said, truth, places, "some", "predictor", "odd", draws=50)
    assert (row.name, row.group, row.n) == ("some", "odd", 5)
    expected = average_map_metrics([rows[place] for place in places])
    assert {name: found.value for name, found in row.heatmaps["misalignment"].items()} == pytest.approx(expected)
    assert (row.heatmaps["misalignment"]["mse_empty"].n, row.heatmaps["misalignment"]["cc"].n) == (2, 3)
    expected = word_metrics([said.words[place] for place in places], [truth.words[place] for place in places])
    assert {name: found.value for name, found in row.words.items()} == pytest.approx(expected)
    for found in (*row.heatmaps["misalignment"].values(), *row.words.values(), *row.scores["overall"].values()):
        assert found.low <= found.value <= found.high


def test_what_is_not_there_is_not_zero(case):
    """Pictures none of whose maps is empty have no MSE of empty maps; without draws there are no intervals."""
    said, truth, _ = case
    row = figures_of(said, truth, [1, 2, 4], "some", "predictor", draws=0)
    assert row.heatmaps["implausibility"]["mse_empty"].value is None
    assert row.heatmaps["implausibility"]["cc"].low is None
    (line,) = [line for line in markdown([row]).splitlines() if line.startswith("| some | 3 |") and " - |" in line][:1]
    assert line.count("|") == 2 + 1 + 7
    assert not Row("maps only", "baseline").scores


def test_markdown_shows_what_was_published():
    text = markdown(published_rows())
    assert (
        "| RAHF augmented prompt (paper) |  | 0.693 / 0.681 | 0.474 / 0.496 | 0.600 / 0.589 | 0.580 / 0.562 |" in text
    )
    assert "| ImageDoctor |  | 0.727 / - | 0.808 / - | 0.681 / - | 0.745 / - |" in text
    assert "| RAHF (paper) |  | 0.00304 | 0.00006 | 0.212 | 2.933 | 0.106 | 1.411 | 0.841 |" in text
    assert "| RAHF multi-head (paper) |  | 62.9 | 33.0 | 43.3 |" in text
    assert f"| scores, PLCC / SRCC | n | {' | '.join(SCORES)} |" in text


def test_published_words_are_consistent():
    """F1 is the harmonic mean of the other two: a digit mistyped would show."""
    for row in published_rows():
        if row.words:
            precision, recall = row.words["precision"].value, row.words["recall"].value
            assert row.words["f1"].value == pytest.approx(2 / (1 / precision + 1 / recall), abs=0.002)


def test_names_cannot_break_a_table(case):
    said, truth, _ = case
    text = markdown([figures_of(said, truth, [0, 1], "prompt = a | b\nc", "predictor", draws=0)])
    assert "| prompt = a \\| b c | 2 |" in text
    assert text.count("\n\n") == 3


@pytest.mark.parametrize(
    ("shares", "labels", "best"),
    [
        ([[0.1, 0.3], [0.9]], [[0, 1], [1]], 0.1),
        ([[0.7, 0.6], [0.9]], [[0, 0], [1]], 0.7),
        ([[0.2, 0.8]], [[0, 1]], 0.5),
        ([[0.2, 1.0]], [[0, 0]], 0.5),
    ],
)
def test_the_share_that_makes_a_word_wrong(shares, labels, best):
    assert best_share(shares, labels) == best


def estimates(value, draws, n=8):
    """The same figure for every metric: what `share_row` divides."""
    one = Estimate(value, np.array(draws, dtype=float), n)
    scores = {name: dict.fromkeys(("plcc", "srcc"), one) for name in SCORES}
    return Estimates(n, scores, {"misalignment": dict.fromkeys(MAP_METRICS, one)}, dict.fromkeys(WORD_METRICS, one))


def test_shares_of_the_ceiling_are_quotients_draw_by_draw():
    """Above 0.1 .. 0.4, below 0.2 .. 0.8: half of it in every draw, whatever the intervals of each alone."""
    row = share_row(estimates(0.3, [0.1, 0.2, 0.4]), estimates(0.6, [0.2, 0.4, 0.8]), "of ceiling")
    assert (row.kind, row.group, row.n) == ("of ceiling", "all", 8)
    assert sorted(row.heatmaps["misalignment"]) == ["auc_judd", "cc", "nss", "sim"]  # in the others, lower is better
    for found in (*row.scores["overall"].values(), *row.heatmaps["misalignment"].values(), *row.words.values()):
        assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 8)
    text = markdown([row])
    assert "| of ceiling | 8 | - | - | 0.500 (0.500, 0.500) | - |" in text
    assert "| of ceiling | 8 | 50.0 (50.0, 50.0) |" in text


def test_there_is_no_share_of_nothing():
    row = share_row(estimates(0.3, [0.1, 0.4]), estimates(0.0, [0.1, -0.1]), "of ceiling")
    assert row.scores["overall"]["srcc"].value is None
    row = share_row(estimates(0.3, [0.1, 0.4, 0.3]), estimates(0.3, [0.1, -0.1, 0.3]), "of ceiling")
    assert (row.words["f1"].low, row.words["f1"].high) == (1, 1)
    assert not share_row(estimates(0.3, []), Estimates(8, {}, {}, {}), "of ceiling").words


def test_who_says_the_same_has_the_whole_of_the_ceiling(case):
    """Scores twice as far apart correlate as well; the same maps and words have the same figures in every draw."""
    said, truth, _ = case
    said = Said(said.maps, truth.scores**2, said.words)
    wider = Said(said.maps, 2 * said.scores - 1, said.words)
    one, other = (estimates_of(what, truth, range(20), draws=30) for what in (said, wider))
    share = share_row(one, other, "of ceiling")
    assert len(share.scores) == len(SCORES)
    maps = share.heatmaps["implausibility"]
    for found in (*share.scores["overall"].values(), *share.words.values(), maps["sim"], maps["auc_judd"]):
        assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
