import math

import pytest
import torch

from reward.losses import caption_loss, heatmap_loss, score_loss, word_loss


def test_squared_errors_average_over_everything():
    assert score_loss(torch.zeros(2, 4), torch.full((2, 4), 0.5)).item() == 0.25
    predicted, true = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    true[0, 1, 2, 2] = 1
    assert heatmap_loss(predicted, true).item() == pytest.approx(1 / 36)


def test_marked_pixels_count_so_many_times():
    true = torch.zeros(1, 2, 2, 2)
    true[0, 0, 0, 0] = 0.5
    predicted = torch.full((1, 2, 2, 2), 0.1)
    assert heatmap_loss(predicted, true).item() == pytest.approx((0.4**2 + 7 * 0.1**2) / 8)
    assert heatmap_loss(predicted, true, 3.0).item() == pytest.approx((3 * 0.4**2 + 7 * 0.1**2) / 8)
    assert heatmap_loss(predicted, true * 0, 3.0).item() == heatmap_loss(predicted, true * 0).item()  # empty maps


def test_where_the_weighted_loss_is_least():
    """One place in four pictures, marked by 0.6 in one: W q m / (1 - q + W q)."""
    true = torch.tensor([0.6, 0.0, 0.0, 0.0])[:, None, None, None]
    for weight, least in ((1.0, 0.15), (3.0, 3 * 0.15 / (0.75 + 3 * 0.25))):
        predicted = torch.full_like(true, least, requires_grad=True)
        heatmap_loss(predicted, true, weight).backward()
        assert predicted.grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_words_average_over_each_prompt_first():
    logits = torch.tensor([[0.0, 0.0, 9.0], [math.log(3), 5.0, 5.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([[1, 0, -100], [0, -100, -100], [-100, -100, -100]])
    expected = (math.log(2) + math.log(4) + 0) / 3
    assert word_loss(logits, labels).item() == pytest.approx(expected)


def test_captions():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    assert caption_loss(logits, torch.tensor([0, 2])).item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert caption_loss(logits[:0], torch.tensor([], dtype=torch.long)).item() == 0
