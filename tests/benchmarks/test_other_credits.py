"""Credits by hand."""

import pytest
import torch
from other_credits import content_baseline_credit, other_credit, right_places, sensitivity

from reward.feedback import Reward
from rl.credit import content_map, focus_weights, paid_credit, to_latent_grid

PULL = torch.zeros(3, 4, 4)
PULL[0, :2, :2], PULL[1, :2, :2] = 3.0, 4.0


def pulled(images, prompts):
    return Reward(total=(images * PULL).sum(dim=(1, 2, 3)), penalties={"blue": images[:, 2]})


def test_right_is_what_is_drawn_and_not_penalised():
    content = torch.tensor([[[0.0, 0.5], [1.0, 1.0]]])
    maps = torch.tensor([[[0.0, 0.0], [2.0, 1.0]]])
    assert right_places(content, maps).tolist() == [[[0.0, 0.5], [0.0, 0.5]]]
    assert torch.equal(right_places(content, torch.zeros_like(maps)), content)


def test_sensitivity_is_the_length_of_the_totals_gradient():
    found = sensitivity(pulled, torch.rand(2, 3, 4, 4), ["a"] * 2, (2, 2))
    assert found.tolist() == [[[5.0, 0.0], [0.0, 0.0]]] * 2


def test_by_what_is_drawn_an_empty_place_is_neither_paid_nor_blamed():
    """Two pictures; at the only place one draws and pays for it, the other is empty."""
    maps, totals = torch.tensor([0.4, 0.0]).view(2, 1, 1), torch.tensor([1.0, 1.0])
    content = torch.tensor([0.8, 0.0]).view(2, 1, 1)
    assert paid_credit(totals, maps, 2, 1e-4, reach=0).flatten().tolist() == pytest.approx([-1.0, 1.0])
    assert content_baseline_credit(totals, maps, content, 2, 1e-4).flatten().tolist() == pytest.approx([0.0, 0.0])


def test_who_pays_more_than_its_group_for_as_much_is_blamed():
    """Two groups of two pictures of 2 x 2 places, sums by hand.

    In the first, at the first place, contents are 1 and 0.5 and penalties 0.6 and 0.8: what is drawn costs
    (0.6 + 0.4) / (1 + 0.25) = 0.8. Elsewhere nothing is. Objectives are 1 - 0.15 and 0.5 - 0.2, their std 0.275.
    The second group has no penalties and totals 3 and 1.
    """
    maps, content = torch.zeros(4, 2, 2), torch.zeros(4, 2, 2)
    maps[:2, 0, 0], content[:2, 0, 0] = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.5])
    content[2:] = torch.rand(2, 2, 2)
    said = content_baseline_credit(torch.tensor([1.0, 0.5, 3.0, 1.0]), maps, content, 2, 1e-4)
    assert said[0].flatten().tolist() == pytest.approx([(0.25 + 0.2 / 4) / 0.275, *[0.25 / 0.275] * 3])
    assert said[1].flatten().tolist() == pytest.approx([(-0.25 - 0.4 / 4) / 0.275, *[-0.25 / 0.275] * 3])
    assert said[2:].flatten().tolist() == pytest.approx([1.0] * 4 + [-1.0] * 4)


@pytest.mark.parametrize("name", ["focus on right", "focus on sensitivity", "paid, content baseline"])
def test_each_name_is_its_own(name):
    images, prompts, advantages = torch.rand(4, 3, 4, 4), ["a"] * 4, torch.tensor([1.0, -1.0, 0.5, -0.5])
    said = pulled(images, prompts)
    maps, content = (to_latent_grid(pixels, (2, 2)) for pixels in (images[:, 2], content_map(images)))
    expected = {
        "focus on right": advantages[:, None, None] * focus_weights(right_places(content, maps), 0.2),
        "focus on sensitivity": advantages[:, None, None] * torch.tensor([[3.4, 0.2], [0.2, 0.2]]),
        "paid, content baseline": content_baseline_credit(said.total, maps, content, 2, 1e-3),
    }
    found = other_credit(name, pulled, said, images, prompts, advantages, (2, 2), group=2, floor=0.2, std_floor=1e-3)
    torch.testing.assert_close(found, expected[name])
