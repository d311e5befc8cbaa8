import pytest
import torch

from rl.advantages import group_advantages
from rl.credit import (
    content_map,
    focus_weights,
    mask_weights,
    paid_credit,
    penalty_map,
    to_latent_grid,
    unit_paid_credit,
    word_map,
)
from rl.losses import ppo_loss
from rl.sde import log_prob_map


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (16, 16), (20, 6), (8, 8)])
def test_latent_grid_keeps_the_mean(size):
    maps = torch.rand(2, 8, 12)
    resized = to_latent_grid(maps, size)
    assert resized.shape == (2, *size)
    torch.testing.assert_close(resized.mean(dim=(1, 2)), maps.mean(dim=(1, 2)))


def test_shrinking_averages_areas_and_an_empty_map_stays_empty():
    maps = torch.tensor([[[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 0.0]]])
    assert to_latent_grid(maps, (1, 2)).tolist() == [[[4.0, 0.0]]]
    assert not to_latent_grid(torch.zeros(1, 4, 4), (2, 2)).any()


def test_content_is_what_differs_from_the_border():
    images = torch.full((1, 3, 32, 32), 0.8)
    images[:, 0, 10:20, 8:16] = 0.1
    content = content_map(images)[0]
    assert content[15, 10] > 0.8
    assert content.sum() == content[10:20, 8:16].sum()


def test_focus_has_mean_one_a_floor_and_no_sign():
    maps = torch.rand(3, 4, 4) * torch.tensor([1.0, 10.0, 0.0])[:, None, None]
    weights = focus_weights(maps, floor=0.2)
    torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(3))
    assert weights.min() >= 0.2
    assert torch.equal(weights[2], torch.ones(4, 4))
    torch.testing.assert_close(focus_weights(torch.full((1, 4, 4), 0.3), 0.1), torch.ones(1, 4, 4))


def test_penalty_maps_are_added_up():
    maps = {"a": torch.full((1, 4, 4), 0.25), "b": torch.full((1, 8, 8), 0.5)}
    torch.testing.assert_close(penalty_map(maps, (2, 2)), torch.full((1, 2, 2), 0.75))
    assert penalty_map({}, (2, 2)) is None


def log_probs():
    old = torch.randn(3, 4, 4, dtype=torch.float64)
    return (old + 0.01 * torch.randn(3, 4, 4, dtype=torch.float64)).requires_grad_(), old


def test_image_loss_is_ppos():
    new, old = log_probs()
    advantages, epsilon = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.001
    loss, metrics = ppo_loss(new, old, advantages, torch.ones(3, 4, 4), epsilon)
    ratios = (new - old).detach().mean(dim=(1, 2)).exp().tolist()
    clipped = [min(max(ratio, 1 - epsilon), 1 + epsilon) for ratio in ratios]
    terms = [min(r * a, c * a) for r, c, a in zip(ratios, clipped, advantages.tolist(), strict=True)]
    assert loss.item() == pytest.approx(-sum(terms) / 3)
    assert float(metrics["clip_fraction"]) == pytest.approx(sum(abs(ratio - 1) > epsilon for ratio in ratios) / 3)


def test_approximate_kl_is_that_of_the_gaussian_steps_per_latent_value():
    """Against the exact divergence of two Gaussians whose means differ by a constant: shift^2 / (2 std^2) a value."""
    generator = torch.Generator().manual_seed(0)
    shift, std = 0.02, torch.tensor(2.0)
    noise = torch.randn(20_000, 4, 3, 2, generator=generator, dtype=torch.float64)
    old, new = (log_prob_map(std * noise, torch.full_like(noise, mean), std) for mean in (0.0, shift))
    _, metrics = ppo_loss(new, old, torch.zeros(len(noise)), torch.ones_like(old), 0.1, channels=4)
    assert float(metrics["approx_kl"]) == pytest.approx(shift**2 / (2 * 2.0**2), rel=0.04)
    _, metrics = ppo_loss(old + 0.1, old, torch.zeros(len(noise)), torch.ones_like(old), 0.1, channels=4)
    assert float(metrics["approx_kl"]) == pytest.approx(0.5 * (24 * 0.1) ** 2 / 24)


@pytest.mark.parametrize("level", ["image", "location"])
def test_first_pass_gradient_is_minus_the_weighted_score(level):
    old = torch.randn(3, 4, 4, dtype=torch.float64)
    new, advantages, weights = old.clone().requires_grad_(), torch.randn(3).double(), torch.rand(3, 4, 4).double()
    loss, metrics = ppo_loss(new, old, advantages, weights, 0.1, level)
    loss.backward()
    torch.testing.assert_close(new.grad, -advantages[:, None, None] * weights / old.numel())
    assert metrics["ratio"] == 1
    assert metrics["ratio_deviation"] == 0


def test_a_constant_map_makes_focus_equal_to_image():
    """Always with the image's ratio; with the location's, on the first pass."""
    new, old = log_probs()
    advantages = torch.randn(3, dtype=torch.float64)
    weights = focus_weights(torch.full((3, 4, 4), 0.7), floor=0.2).double()
    plain, _ = ppo_loss(new, old, advantages, torch.ones(3, 4, 4).double(), 0.01)
    focused, _ = ppo_loss(new, old, advantages, weights, 0.01)
    torch.testing.assert_close(plain, focused)
    gradients = []
    for level, weight in (("image", torch.ones(3, 4, 4).double()), ("location", weights)):
        start = old.clone().requires_grad_()
        ppo_loss(start, old, advantages, weight, 0.01, level)[0].backward()
        gradients.append(start.grad)
    torch.testing.assert_close(*gradients)


def test_locations_are_clipped_one_by_one():
    old = torch.zeros(1, 1, 2)
    new = torch.tensor([[[0.5, 0.0]]], requires_grad=True)
    loss, metrics = ppo_loss(new, old, torch.ones(1), torch.ones(1, 1, 2), 0.1, "location")
    loss.backward()
    assert loss.item() == pytest.approx(-(1.1 + 1.0) / 2)
    assert new.grad.tolist() == [[[0.0, -0.5]]]  # the clipped place has no gradient, the other keeps its own
    assert metrics["clip_fraction"] == 0.5


def test_clip_range_may_be_wider_above_than_below():
    old = torch.zeros(2, 1, 1)
    new = torch.tensor([0.2, -0.2]).view(2, 1, 1).requires_grad_()
    loss, metrics = ppo_loss(new, old, torch.tensor([1.0, -1.0]), torch.ones(2, 1, 1), 0.1, epsilon_high=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-(torch.tensor(0.2).exp().item() - 0.9) / 2)
    assert new.grad[1].item() == 0  # fell further than 0.1, while the other may rise by 0.3
    assert new.grad[0].item() != 0
    assert metrics["clip_fraction"] == 0.5


def rollout(groups=3, size=4, height=5, width=4):
    generator = torch.Generator().manual_seed(1)
    totals = torch.rand(groups * size, generator=generator)
    return totals, torch.rand(groups * size, height, width, generator=generator), size


def test_paying_for_all_places_is_image_credit():
    totals, maps, size = rollout()
    expected = group_advantages(totals - maps.mean(dim=(1, 2)), size, 1e-3)
    found = paid_credit(totals, maps, size, 1e-3, reach=4)
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found))


def test_a_map_that_is_the_same_for_all_leaves_nothing_to_pay():
    totals, maps, size = rollout()
    maps = maps[:1].expand_as(maps)
    expected = group_advantages(totals, size, 1e-3)[:, None, None].expand_as(maps)
    torch.testing.assert_close(paid_credit(totals, maps, size, 1e-3, reach=1), expected)
    torch.testing.assert_close(unit_paid_credit(totals, maps, size, 1e-3, weight=1.0), expected)


def test_a_place_pays_for_its_neighbours_and_no_others():
    maps = torch.zeros(2, 5, 5)
    maps[0, 2, 1] = 1.0
    found = paid_credit(torch.zeros(2), maps, 2, 1e-6, reach=1)
    scale = (torch.tensor([0.0, 1.0]) / 25).std(correction=0)
    expected = torch.zeros(5, 5)
    expected[1:4, 0:3] = -0.5 / 25 / scale
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], -expected)


def test_unit_scale_counts_a_place_as_much_as_the_whole_picture():
    totals, maps, size = rollout()
    found = unit_paid_credit(totals, maps, size, 1e-3, weight=0.5) - group_advantages(totals, size, 1e-3)[:, None, None]
    groups = found.view(-1, size, 5, 4)
    torch.testing.assert_close(groups.std(dim=1, correction=0), torch.full((3, 5, 4), 0.5))


def test_mask_spares_what_is_penalised():
    maps = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
    assert mask_weights(maps, 1.0).tolist() == [[[2.0, 0.0]], [[1.0, 1.0]]]
    assert mask_weights(torch.zeros(1, 1, 2), 0.0).tolist() == [[[1.0, 1.0]]]


def test_word_map_is_the_attention_of_what_is_wrong():
    attention = torch.zeros(2, 4, 1, 2)
    attention[0, 1], attention[0, 2] = torch.tensor([[0.2, 0.6]]), torch.tensor([[0.0, 0.4]])
    positions = [[[1, 2], [3], []], [[1], [2]]]
    penalties = [torch.tensor([0.5, 0.0, 1.0]), torch.zeros(2)]
    found = word_map(attention, positions, penalties)  # the pieces' mean is (0.1, 0.5); of mean 1 it is (1/3, 5/3)
    torch.testing.assert_close(found, torch.tensor([[[0.5 / 3, 2.5 / 3]], [[0.0, 0.0]]]))
    assert torch.equal(focus_weights(found, 0.2)[1], torch.ones(1, 2))
    with pytest.raises(ValueError, match="2 word penalties for a prompt of 3 words"):
        word_map(attention, positions, [torch.ones(2), torch.zeros(2)])
