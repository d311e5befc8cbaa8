"""The policy gradient of each sampling step and kind of credit, to compare them.

Shapes: N pictures, S steps, P trained weights, M kinds of credit, h x w the latent grid.
"""

from collections.abc import Sequence

import torch

from rl.ddpo_config import DDPOConfig
from rl.policy import StableDiffusionPolicy
from rl.rollout import Trajectory
from rl.sde import Schedule, log_prob_map, step_mean


def step_gradients(
    policy: StableDiffusionPolicy,
    trajectory: Trajectory,
    prompts: Sequence[str],
    credits: torch.Tensor,
    schedule: Schedule,
    args: DDPOConfig,
    pictures: range,
) -> torch.Tensor:
    """At each step of `trajectory` the gradient of -mean(credit * l) over `pictures`, for each of M credits.

    That is the gradient of the loss on the first pass (`rl.losses.ppo_loss`). The network is the policy's own, not an
    engine's wrapping, for nothing is to be averaged over ranks here.

    Args:
        prompts: of the N pictures of `trajectory`.
        credits: (M, N, h, w), what the log-prob at each place is multiplied by.

    Returns:
        (M, S, P) float32.
    """
    weights = [weight for weight in policy.network.parameters() if weight.requires_grad]
    count = sum(weight.numel() for weight in weights)
    found = torch.zeros(len(credits), len(trajectory.steps), count, device=weights[0].device)
    batch = args.per_device_train_batch_size
    # In float16 small gradients would be 0 on their way; in training, the Trainer's scaler sees to that.
    scale = 2.0**12 if args.fp16 else 1.0
    for k, step in enumerate(trajectory.steps.tolist()):
        for first in range(pictures.start, pictures.stop, batch):
            rows = slice(first, first + batch)
            latents = trajectory.latents[k, rows]
            index = torch.full((len(latents),), step, device=latents.device)
            output = policy.predict(
                policy.network,
                latents,
                schedule.timesteps.to(latents.device)[index],
                policy.encode(prompts[rows]),
                args.guidance_scale if args.train_guidance else 1.0,
            )
            log_probs = log_prob_map(trajectory.next_latents[k, rows], *step_mean(output, latents, index, schedule))
            share = len(latents) / len(pictures)
            for kind, credit in enumerate(credits):
                loss = -(credit[rows] * log_probs).mean() * share * scale
                gradients = torch.autograd.grad(loss, weights, retain_graph=kind < len(credits) - 1)
                found[kind, k] += torch.cat([gradient.flatten().float() for gradient in gradients]) / scale
    return found
