"""Credits by hand."""

import pytest
import torch
from other_credits import content_baseline_credit, right_places, sensitivity

from reward.feedback import Reward
from rl.credit import paid_credit


def test_right_is_what_is_drawn_and_not_penalised():
    content = torch.tensor([[[0.0, 0.5], [1.0, 1.0]]])
    maps = torch.tensor([[[0.0, 0.0], [2.0, 1.0]]])
    assert right_places(content, maps).tolist() == [[[0.0, 0.5], [0.0, 0.5]]]
    assert torch.equal(right_places(content, torch.zeros_like(maps)), content)


def test_sensitivity_is_the_length_of_the_totals_gradient():
    pull = torch.zeros(3, 4, 4)
    pull[0, :2, :2], pull[1, :2, :2] = 3.0, 4.0

    def reward(images, prompts):
        return Reward(total=(images * pull).sum(dim=(1, 2, 3)))

    found = sensitivity(reward, torch.rand(2, 3, 4, 4), ["a"] * 2, (2, 2))
    assert found.tolist() == [[[5.0, 0.0], [0.0, 0.0]]] * 2


def test_by_what_is_drawn_an_empty_place_is_neither_paid_nor_blamed():
    """Two pictures; at the only place one draws and pays for it, the other is empty."""
    maps, totals = torch.tensor([0.4, 0.0]).view(2, 1, 1), torch.tensor([1.0, 1.0])
    content = torch.tensor([0.8, 0.0]).view(2, 1, 1)
    assert paid_credit(totals, maps, 2, 1e-4, reach=0).flatten().tolist() == pytest.approx([-1.0, 1.0])
    assert content_baseline_credit(totals, maps, content, 2, 1e-4).flatten().tolist() == pytest.approx([0.0, 0.0])
    better = content_baseline_credit(torch.tensor([1.2, 1.0]), maps, content, 2, 1e-4)
    assert better.flatten().tolist() == pytest.approx([1.0, -1.0])  # totals 0.1 from their mean, objectives too


def test_who_pays_more_than_others_for_as_much_is_blamed():
    maps, content = torch.tensor([0.6, 0.2]).view(2, 1, 1), torch.ones(2, 1, 1)
    said = content_baseline_credit(torch.zeros(2), maps, content, 2, 1e-4)
    assert said.flatten().tolist() == pytest.approx([-1.0, 1.0])
