"""Sheets of pictures: which words are struck out, and how strong a map is drawn."""

import pytest
import torch

from reward.feedback import Reward
from rl import pictures
from rl.experience import Samples

PROMPTS = ["two", "a red circle left of a blue square"]


@pytest.fixture
def drawn(monkeypatch):
    """What was struck out, and with which maps, column by column."""
    struck, maps = [], []
    text, over = pictures.struck_text, pictures.overlay
    monkeypatch.setattr(
        pictures, "struck_text", lambda words, wrong, *more: struck.append(wrong) or text(words, wrong, *more)
    )
    monkeypatch.setattr(
        pictures, "overlay", lambda image, heatmap, *more: maps.append(heatmap) or over(image, heatmap, *more)
    )
    return struck, maps


def samples(wrong, costs=None, peak=1.0, heatmaps=None):
    penalties = {"implausibility": torch.tensor([0.5, 1.0])[:, None, None] * torch.full((2, 4, 4), peak)}
    reward = Reward(torch.zeros(2), penalties, word_penalties=costs, wrong_words=wrong, heatmaps=heatmaps or {})
    return Samples(torch.rand(2, 3, 16, 16), PROMPTS, reward)


def test_the_words_that_are_wrong_are_struck_whatever_they_cost(drawn):
    """A word of a long prompt costs little; and where all is right, the dearest word is still right."""
    struck, _ = drawn
    costs = [torch.tensor([1.0]), torch.full((8,), 0.01)]
    wrong = [torch.tensor([False]), torch.arange(8) == 1]
    pictures.sample_sheet(samples(wrong, costs))
    assert struck == [[0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    struck.clear()
    pictures.sample_sheet(samples(None, costs))
    assert struck == [[0.0], [0.0] * 8], "a reward that does not say which are wrong"


def test_heatmaps_are_shown_as_they_are_whether_or_not_they_cost_anything(drawn):
    _, maps = drawn
    heatmaps = {"implausibility": torch.full((2, 4, 4), 0.2), "misalignment": torch.full((2, 4, 4), 0.4)}
    pictures.sample_sheet(samples(None, peak=3.0, heatmaps=heatmaps))
    assert [round(float(one.max()), 3) for one in maps] == [0.2, 0.4, 0.2, 0.4]


def test_penalties_without_a_heatmap_are_shown_beside_the_heatmaps_of_others(drawn):
    """Of several rewards, one may have heatmaps and another penalties alone."""
    _, maps = drawn
    pictures.sample_sheet(samples(None, peak=3.0, heatmaps={"rich.misalignment": torch.full((2, 4, 4), 0.4)}))
    assert [round(float(one.max()), 3) for one in maps] == [0.4, 0.5, 0.4, 1.0]


def test_pictures_that_nobody_judged_are_shown_with_their_prompts_alone(drawn):
    struck, maps = drawn
    plain = Samples.of(torch.rand(3, 3, 16, 16), [*PROMPTS, "one more"], None, count=2)
    sheet = pictures.before_after_sheet(plain, plain)
    assert (sheet.width, maps) == (pictures.sample_sheet(plain).width, [])
    assert [len(words) for words in struck] == [1, 8] * 3
    assert sheet.height < pictures.before_after_sheet(samples(None), samples(None)).height


def test_maps_before_and_after_are_drawn_to_one_scale(drawn):
    _, maps = drawn
    before, after = samples(None, peak=2.0), samples(None, peak=1.0)
    sheet = pictures.before_after_sheet(before, after)
    assert [float(one.max()) for one in maps] == [0.5, 1.0, 0.25, 0.5]
    assert sheet.width > 2 * 128
