"""The policy gradient of each sampling step, chunk by chunk of a rollout, for `rl.step_probe`.

Shapes: S steps, P trained weights, B pictures of a micro-batch.
"""

from collections.abc import Iterator

import torch

from rl.ddpo_config import DDPOConfig
from rl.experience import Experience
from rl.policy import StableDiffusionPolicy
from rl.sde import Schedule, log_prob_map, step_mean


def chunk_gradients(
    policy: StableDiffusionPolicy, experience: Experience, schedule: Schedule, args: DDPOConfig
) -> Iterator[torch.Tensor]:
    """For each chunk of this rank's pictures (S, P) float32: at each step the gradient of -mean(credit * l).

    That is the gradient of the loss on the first pass (`rl.losses.ppo_loss`). The network is the policy's own, not an
    engine's wrapping, for nothing is to be averaged over ranks here.
    """
    for first in range(0, len(experience.prompts), args.chunk_size):
        yield torch.stack(
            [
                _gradient(policy, experience, schedule, args, k, range(first, first + args.chunk_size))
                for k in range(len(experience.trajectory.steps))
            ]
        )


def _gradient(
    policy: StableDiffusionPolicy, experience: Experience, schedule: Schedule, args: DDPOConfig, k: int, chunk: range
) -> torch.Tensor:
    weights = [weight for weight in policy.network.parameters() if weight.requires_grad]
    total = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
    batch = args.per_device_train_batch_size
    for first in range(chunk.start, chunk.stop, batch):
        rows = slice(first, first + batch)
        latents = experience.trajectory.latents[k, rows]
        index = torch.full((len(latents),), int(experience.trajectory.steps[k]), device=latents.device)
        output = policy.predict(
            policy.network,
            latents,
            schedule.timesteps.to(latents.device)[index],
            policy.encode(experience.prompts[rows]),
            args.guidance_scale if args.train_guidance else 1.0,
        )
        mean, std = step_mean(output, latents, index, schedule)
        log_probs = log_prob_map(experience.trajectory.next_latents[k, rows], mean, std)
        credit = experience.advantages[rows, None, None] * experience.weights[rows]
        gradients = torch.autograd.grad(-(credit * log_probs).mean() * batch / len(chunk), weights)
        total += torch.cat([gradient.flatten().float() for gradient in gradients])
    return total
