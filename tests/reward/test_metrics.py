import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, pearsonr, spearmanr

from reward.metrics import heatmap_metrics, map_metrics, score_metrics, word_metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_scores_agree_with_scipy(rng):
    predicted, true = rng.random(50).round(1), rng.random(50).round(1)  # rounded: with ties
    found = score_metrics(torch.tensor(predicted), true)
    assert found["plcc"] == pytest.approx(pearsonr(predicted, true).statistic, abs=1e-6)
    assert found["srcc"] == pytest.approx(spearmanr(predicted, true).statistic, abs=1e-12)


@pytest.mark.parametrize("predicted", [[0.3] * 5, [0.5]])
def test_scores_of_a_constant_are_zero(predicted):
    assert score_metrics(predicted, list(np.linspace(0, 1, len(predicted)))) == {"plcc": 0.0, "srcc": 0.0}


def test_map_metrics_by_hand():
    """Four pixels: P = .1 .2 .3 .4, G = 0 0 .5 .5."""
    found = map_metrics(np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0, 0], [0.5, 0.5]]))
    assert found["mse"] == pytest.approx((0.01 + 0.04 + 0.04 + 0.01) / 4)
    assert found["cc"] == pytest.approx(2 / np.sqrt(5))
    assert found["sim"] == pytest.approx(0.3 + 0.4)
    assert found["kld"] == pytest.approx(0.5 * np.log(0.5 / 0.3) + 0.5 * np.log(0.5 / 0.4), abs=1e-5)
    assert found["nss"] == pytest.approx((0.35 - 0.25) / np.std([0.1, 0.2, 0.3, 0.4]))
    assert found["auc_judd"] == 1.0
    assert "mse_empty" not in found


def test_auc_is_the_share_of_pairs_in_order(rng):
    p, g = rng.integers(0, 5, (6, 7)) / 5, rng.random((6, 7)) * (rng.random((6, 7)) < 0.3)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[g > 0] for b in p[g == 0]]
    assert map_metrics(p, g)["auc_judd"] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("levels", [3, 256, 10**9])
def test_auc_agrees_with_mann_and_whitney(rng, levels):
    p, g = rng.integers(0, levels, (64, 48)) / levels, rng.random((64, 48)) < 0.1
    expected = mannwhitneyu(p[g], p[~g]).statistic / (g.sum() * (~g).sum())
    assert map_metrics(p, g)["auc_judd"] == pytest.approx(expected, abs=1e-12)
    assert map_metrics(1 - p, g)["auc_judd"] == pytest.approx(1 - expected, abs=1e-12)


def test_extremes_of_auc(rng):
    g = (rng.random((9, 9)) < 0.2).astype(float)
    assert [map_metrics(p, g)["auc_judd"] for p in (g, 1 - g, 0.5 + 0 * g)] == [1.0, 0.0, 0.5]


def test_tensors_keep_their_precision():
    """Values that are one number in float32."""
    p = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert heatmap_metrics(p[None], torch.tensor([[[0.0, 1.0]]]))["auc_judd"] == 1.0
    assert heatmap_metrics(torch.ones(1, 2, 2, dtype=torch.bfloat16), np.zeros((1, 2, 2)))["mse"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match="1 of 4 values are NaN or infinite"):
        heatmap_metrics([[[0.1, 0.2], [value, 0.4]]], np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="1 of 2 values are NaN or infinite"):
        score_metrics([0.5, value], [0.1, 0.2])


def test_identical_maps(rng):
    g = rng.random((8, 8)) * (rng.random((8, 8)) < 0.5)
    found = map_metrics(g, g)
    assert found["cc"] == pytest.approx(1)
    assert found["sim"] == pytest.approx(1)
    assert found["kld"] == pytest.approx(0, abs=1e-4)
    assert found["mse"] == 0


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_predictions_have_defined_values(value):
    g = np.zeros((4, 4))
    g[0, :2] = 0.5
    found = map_metrics(np.full((4, 4), value), g)
    assert (found["cc"], found["nss"], found["auc_judd"]) == (0, 0, 0.5)
    assert found["sim"] == pytest.approx(2 / 16)
    assert found["kld"] == pytest.approx(np.log(0.5 * 16), abs=1e-4)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_correlation_and_nss_do_not_know_the_unit(rng, unit):
    p, g = rng.random((8, 8)), rng.random((8, 8)) * (rng.random((8, 8)) < 0.5)
    found, wanted = map_metrics(unit * p, g), map_metrics(p, g)
    for name in ("cc", "nss", "auc_judd"):
        assert found[name] == pytest.approx(wanted[name]), name
    assert score_metrics(unit * p[0], g[0]) == pytest.approx(score_metrics(p[0], g[0]))


def test_a_true_map_without_background_is_defined():
    found = map_metrics(np.eye(3), np.ones((3, 3)))
    assert (found["cc"], found["auc_judd"]) == (0, 0.5)
    assert np.isfinite(list(found.values())).all()


def test_averages_are_over_the_images_they_are_defined_for(rng):
    predicted, true = rng.random((3, 4, 4)), np.zeros((3, 4, 4))
    true[0, 1, 1] = 1.0
    found = heatmap_metrics(torch.tensor(predicted), torch.tensor(true))
    assert found["mse"] == pytest.approx(((predicted - true) ** 2).mean(), rel=1e-5)
    assert found["mse_empty"] == pytest.approx((predicted[1:] ** 2).mean(), rel=1e-5)
    assert found["cc"] == pytest.approx(map_metrics(predicted[0], true[0])["cc"], rel=1e-5)


def test_averages_over_no_image_are_zero():
    found = heatmap_metrics(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)))
    assert set(found.values()) == {0.0}
    assert list(found) == ["mse", "mse_empty", "cc", "sim", "kld", "nss", "auc_judd"]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
        heatmap_metrics(np.zeros((2, 3, 3)), np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        score_metrics([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="prompt 1"):
        word_metrics([[1], [1, 0]], [[1], [1]])


def test_words():
    found = word_metrics([[1, 0, 1], [0], []], [[1, 1, 0], [0], []])
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert word_metrics([[0, 0]], [[1, 0]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert word_metrics([[1]], [[0]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert word_metrics([[True, False], [np.True_]], [[1, 0], [0.0]])["precision"] == 0.5
    assert word_metrics([], []) == word_metrics([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize("wrong", [-100, 2, 0.7, float("nan"), None], ids=str)
def test_words_are_marked_or_not(wrong):
    with pytest.raises(ValueError, match=f"1 of 3 labels of words are not 0 or 1, the first is {wrong}; leave out"):
        word_metrics([[1, 0], [1]], [[1, 0], [wrong]])
    with pytest.raises(ValueError, match="2 of 3 predictions of words are not 0 or 1"):
        word_metrics([[wrong, 0], [wrong]], [[1, 0], [1]])
