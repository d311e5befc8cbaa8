"""Kinds of credit that were tried by their gradients, and are not offered: where a picture is right, where its score
comes from, and blame by what is drawn at the place.

Shapes: N pictures in groups of G pictures of one prompt, H x W pixels, h x w the latent grid.
"""

from collections.abc import Sequence

import torch

from reward.feedback import Reward, RewardFn
from rl.credit import content_map, focus_weights, penalty_map, to_latent_grid

OTHERS = ("focus on right", "focus on sensitivity", "paid, content baseline")


def other_credit(
    name: str, reward: RewardFn, said: Reward, images: torch.Tensor, prompts: Sequence[str], advantages: torch.Tensor,
    size: tuple[int, int], group: int, floor: float, std_floor: float,
) -> torch.Tensor:  # fmt: skip
    """What the log-prob at each place is multiplied by, (N, h, w).

    Args:
        name: of `OTHERS`.
        said: what `reward` said of `images` (N, 3, H, W) in [0, 1]; with penalty maps.
        advantages: (N,), of credit `image`.
        size: (h, w).
        group: G; the pictures of a prompt next to each other.
        floor: of the focus, see `rl.credit.focus_weights`.
        std_floor: smallest std of the objective that is divided by.
    """
    maps = penalty_map(said.penalties, size)
    content = to_latent_grid(content_map(images), size)
    if name == "paid, content baseline":
        return content_baseline_credit(said.total, maps, content, group, std_floor)
    where = right_places(content, maps) if name == "focus on right" else sensitivity(reward, images, prompts, size)
    return advantages[:, None, None] * focus_weights(where, floor)


def right_places(content: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Where something is drawn that is not penalised: (N, h, w) in [0, 1], penalties (N, h, w) >= 0 -> (N, h, w)."""
    largest = maps.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return content * (1 - maps / largest)


def sensitivity(reward: RewardFn, images: torch.Tensor, prompts: Sequence[str], size: tuple[int, int]) -> torch.Tensor:
    """How much the total hangs on each place: the mean length of its gradient by a pixel there, (N, h, w)."""
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reward(images, prompts).total.sum(), images)
    return to_latent_grid(gradient.norm(dim=1), size)


def content_baseline_credit(
    totals: torch.Tensor, maps: torch.Tensor, content: torch.Tensor, group: int, std_floor: float
) -> torch.Tensor:
    """`paid` at its own place, but less what the group's pictures, this one among them, pay there for as much as is
    drawn, not less their mean: a place that is empty and without a penalty is neither paid nor blamed.

    What is drawn is the action's own doing, so it is no baseline that leaves the expected gradient as it is; and who
    alone draws at a place pays nothing.

    Args:
        totals: (N,), without the penalties.
        maps: (N, h, w) >= 0, in the units of `totals`.
        content: (N, h, w) in [0, 1], how much is drawn.
    """
    places = maps.shape[-2] * maps.shape[-1]
    totals, drawn = totals.float().view(-1, group), content.view(-1, group, *content.shape[1:])
    penalties = maps.float().view_as(drawn)
    scale = (totals - penalties.mean(dim=(-2, -1))).std(dim=1, correction=0).clamp(min=std_floor)[:, None, None, None]
    price = (drawn * penalties).sum(dim=1, keepdim=True) / drawn.square().sum(dim=1, keepdim=True).clamp(min=1e-6)
    better = (totals - totals.mean(dim=1, keepdim=True))[:, :, None, None]
    return ((better - (penalties - price * drawn) / places) / scale).flatten(0, 1)
