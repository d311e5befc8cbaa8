"""Defects are where they are said to be, and depend on the picture's number only."""

import numpy as np
import pytest
import torch

from finetune.agreement_measures import groups_of, preference
from finetune.planted_defects import BLOTCH, DEFECTS, SMEAR, blotch, smear, turned_colours, wrong_prompt

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture
def scenes():
    """A red square at another place of each grey picture."""
    images = torch.full((3, 3, 64, 64), 0.5)
    for place, (row, column) in enumerate([(8, 8), (40, 20), (20, 44)]):
        images[place, :, row : row + 12, column : column + 12] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return images


@pytest.mark.parametrize("name", list(DEFECTS))
def test_the_same_picture_gets_the_same_defect(scenes, name):
    images, prompts = DEFECTS[name](scenes, PROMPTS, [0, 1, 2], PROMPTS)
    again, said = DEFECTS[name](scenes[1:2], PROMPTS[1:2], [1], PROMPTS)
    assert torch.equal(images[1:2], again)
    assert prompts[1:2] == said
    assert images.shape == scenes.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert not torch.equal(images, scenes) or prompts != PROMPTS


def test_what_is_drawn_is_smeared_and_its_colours_stay(scenes):
    images, _ = smear(scenes, PROMPTS, [0, 1, 2], PROMPTS)
    changed = (images != scenes).any(dim=1)
    for one, mine, before in zip(images, changed, scenes, strict=True):
        assert 20 < mine.sum() < 3.2 * (SMEAR * 64 + 1) ** 2
        assert set(one.unique().tolist()) == set(before.unique().tolist())
        rows, columns = mine.nonzero().float().mean(dim=0)
        square = (before[0] > 0.8).nonzero().float().mean(dim=0)
        assert (rows - square[0]).abs() < 10
        assert (columns - square[1]).abs() < 10


def test_a_blotch_is_a_disk_of_another_colour(scenes):
    images, _ = blotch(scenes, PROMPTS, [0, 1, 2], PROMPTS)
    changed = (images != scenes).any(dim=1).sum(dim=(1, 2))
    assert changed == pytest.approx(torch.full((3,), 3.14 * round(BLOTCH * 64) ** 2), rel=0.1)


def test_colours_are_turned(scenes):
    images, _ = turned_colours(scenes, PROMPTS, [0, 1, 2], PROMPTS)
    assert images[0, :, 10, 10].tolist() == pytest.approx([0.1, 0.9, 0.1])  # red became green


def test_a_wrong_prompt_is_another_one():
    images = torch.zeros(3, 3, 8, 8)
    _, prompts = wrong_prompt(images, PROMPTS, [0, 1, 2], PROMPTS)
    assert prompts == ["a blue square", "a red circle", "a blue square"]
    assert wrong_prompt(images[:1], ["a"], [0], ["a", "a"])[1] == ["a"]


def test_preference_by_hand():
    found = preference(np.array([1.0, 1.0, 2.0, 0.0]), np.array([0.0, 2.0, 2.0, -1.0]), groups_of(["a", "a", "b", "b"]))
    assert (found.value, found.n) == (0.625, 4)
    assert (found.low, found.high) == (0.5, 0.75)  # of two prompts: a is 0.5, b is 0.75
