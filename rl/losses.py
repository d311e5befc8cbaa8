"""The clipped policy-gradient loss of one micro-batch. Pure functions: tensors in, loss and metrics out.

Shapes: B rows (picture, timestep), h x w the latent grid.
"""

from typing import Literal

import torch


def ppo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float,
    level: Literal["image", "location"] = "image",
    channels: int = 1,
    epsilon_high: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate, "Proximal Policy Optimization Algorithms" (Schulman et al. 2017, arXiv 1707.06347), eq. 7:
    loss = -mean of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A).

    Args:
        log_probs: (B, h, w), l(h, w) under the policy.
        old_log_probs: (B, h, w), the same under the policy that sampled.
        advantages: (B,).
        weights: (B, h, w) of mean 1 over places: where A acts (F of `credit.focus_weights`); ones for the kinds
            without a place. Or, with advantages of 1 and at the level "location", what each place's log-prob is
            multiplied by (`credit.paid_credit`).
        epsilon, epsilon_high: how far a ratio may fall below and rise above 1; `epsilon_high` None: as `epsilon`.
        level: "image": one ratio a row, exp(mean over places of weights * (l - l_old)), the mean over B rows is taken.
            "location": a ratio at each place, exp(l - l_old), clipped there, and A * weights as the place's advantage;
            the mean over B * h * w places is taken. On the first pass both have the same gradient,
            -mean(A * weights * grad l); a place's ratio moves about sqrt(h * w) times further than an image's.
        channels: C of the latents, over which the log-probs are means; only `approx_kl` needs it.

    Returns:
        loss, a scalar, and metrics: `ratio` (mean), `ratio_deviation` (largest |ratio - 1|), `clip_fraction` (share of
        ratios outside the clip range), `approx_kl` (KL divergence from the policy that sampled, in nats per latent
        value as `sde.kl_map` is: the mean over images of the squared log-ratio / 2, divided by the D = C * h * w values
        of an image, whose log-ratio is D times the mean of l - l_old).
    """
    difference = log_probs - old_log_probs
    if level == "image":
        ratio = (weights * difference).mean(dim=(-2, -1)).exp()
        strength = advantages
    else:
        ratio = difference.exp()
        strength = advantages[:, None, None] * weights
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    surrogate = torch.minimum(ratio * strength, ratio.clamp(low, high) * strength)
    detached = ratio.detach()
    values = channels * difference[0].numel()  # D
    metrics = {
        "ratio": detached.mean(),
        "ratio_deviation": (detached - 1).abs().max(),
        "clip_fraction": ((detached < low) | (detached > high)).float().mean(),
        "approx_kl": 0.5 * values * difference.detach().mean(dim=(-2, -1)).square().mean(),
    }
    return -surrogate.mean(), metrics
