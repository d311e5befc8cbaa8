"""The loss on policies whose true gradient is known: one Gaussian step, reward by a formula, no network.

A "picture" is the action x (N, C, h, w) of one step with mean theta (C, h, w) and a fixed std.
"""

import pytest
import torch

from rl.advantages import group_advantages
from rl.credit import focus_weights, paid_credit, unit_paid_credit
from rl.ddpo_config import DDPOConfig
from rl.losses import ppo_loss
from rl.sde import log_prob_map

STD = torch.tensor(0.5)
GROUP = 8


def act(theta, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return theta + STD * torch.randn(count, *theta.shape, generator=generator)


def gradient(theta, actions, advantages, weights, level="image"):
    """Of minus the loss, with respect to theta: where the policy is pushed to."""
    theta = theta.clone().requires_grad_()
    log_probs = log_prob_map(actions, theta.expand_as(actions), STD)
    loss, _ = ppo_loss(log_probs, log_probs.detach(), advantages, weights, 0.1, level, channels=theta.shape[0])
    (-loss).backward()
    return theta.grad


def test_policy_gradient_points_where_the_reward_rises():
    """R = -|x - a|^2: the true gradient of its mean is -2 (theta - a)."""
    theta, aim = torch.zeros(4, 2, 2), torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(5))
    actions = act(theta, 100_000)
    rewards = -(actions - aim).square().sum(dim=(1, 2, 3))
    advantages = group_advantages(rewards, GROUP, 1e-3)
    found = gradient(theta, actions, advantages, torch.ones(len(actions), 2, 2))
    assert torch.cosine_similarity(found.flatten(), (aim - theta).flatten(), dim=0) > 0.99


def test_gradient_of_a_policy_of_one_weight_is_the_score_function_estimate():
    """By hand: d/dw of mean(A * mean over the picture of log N(x; w f, s^2)) is mean(A * mean(f (x - w f) / s^2))."""
    weight = torch.tensor(0.3, requires_grad=True)
    features = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2))
    actions, advantages = act(0.3 * features, 16), torch.linspace(-1, 1, 16)
    log_probs = log_prob_map(actions, (weight * features).expand_as(actions), STD)
    loss, _ = ppo_loss(log_probs, log_probs.detach(), advantages, torch.ones(16, 2, 2), 0.01, channels=3)
    loss.backward()
    by_hand = (advantages * (features * (actions - 0.3 * features) / STD**2).mean(dim=(1, 2, 3))).mean()
    assert weight.grad.item() == pytest.approx(-by_hand.item(), rel=1e-5)


def test_paying_at_ones_own_place_is_the_same_gradient_with_less_noise():
    """Where what is done at a place decides the penalty there and no other, and R is minus the penalties' mean.

    The floor is the scale of both: the std of eight rewards shrinks the larger of them, and so the gradient of `image`.
    """
    theta, floor = torch.linspace(-0.5, 0.5, 64).view(1, 8, 8), 10.0
    images, places = [], []
    for trial in range(300):
        actions = act(theta, 64, seed=trial)
        penalties, totals = actions[:, 0].square(), torch.zeros(64)
        advantages = group_advantages(totals - penalties.mean(dim=(1, 2)), GROUP, floor)
        images.append(gradient(theta, actions, advantages, torch.ones(64, 8, 8)))
        credit = paid_credit(totals, penalties, GROUP, floor, reach=0)
        places.append(gradient(theta, actions, torch.ones(64), credit, "location"))
    image, place = torch.stack(images), torch.stack(places)
    assert place.var(dim=0).mean() < image.var(dim=0).mean() / 10
    direction = -theta / theta.norm()  # of the true gradient
    along = ((image - place) * direction).sum(dim=(1, 2, 3))
    assert along.mean().abs() < 3 * along.std() / len(along) ** 0.5
    assert torch.cosine_similarity(place.mean(dim=0).flatten(), direction.flatten(), dim=0) > 0.99


def drawn(actions):
    """How much is drawn at each place: (N, 1, h, w) -> (N, h, w) in (0, 1)."""
    return torch.sigmoid(2 * actions[:, 0])


def trained(credit, updates=40):
    """Mean amount drawn after some updates, from 0.5: drawing pays 1 a place and costs a defect of 0.6 on average.

    The total says how much is drawn, in the whole picture; a place's penalty is what is drawn there times its defect.
    """
    theta = torch.zeros(1, 8, 8)
    for update in range(updates):
        actions = act(theta, 64, seed=update)
        defects = 1.2 * torch.rand(64, 8, 8, generator=torch.Generator().manual_seed(1000 + update))
        penalties, totals = drawn(actions) * defects, drawn(actions).mean(dim=(1, 2))
        advantages = group_advantages(totals - penalties.mean(dim=(1, 2)), GROUP, 1e-3)
        ones = torch.ones(64)
        if credit == "image":
            push = gradient(theta, actions, advantages, ones[:, None, None].expand(64, 8, 8))
        elif credit == "focus":
            push = gradient(theta, actions, advantages, focus_weights(penalties, 0.2))
        elif credit == "by sign":
            blamed = focus_weights(penalties, 0.0)
            weights = torch.where(advantages[:, None, None] < 0, blamed, torch.ones_like(blamed))
            push = gradient(theta, actions, advantages, weights)
        elif credit == "paid":
            push = gradient(theta, actions, ones, paid_credit(totals, penalties, GROUP, 1e-3, reach=0), "location")
        else:
            assert credit == "unit"
            push = gradient(theta, actions, ones, unit_paid_credit(totals, penalties, GROUP, 1e-3, 1.0), "location")
        theta = theta + 2 * push / push.norm()
    return float(drawn(theta[None]).mean())


def test_the_trap_empties_the_pictures_and_the_default_does_not_fall_into_it():
    """Drawing pays in the objective, but a penalty is paid only where something is drawn."""
    sound = {DDPOConfig.credit, "image", "focus", "paid"}
    assert {credit for credit in sound if trained(credit) > 0.55} == sound
    assert trained("unit") < 0.1
    assert trained("by sign") < 0.1
