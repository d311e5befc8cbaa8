"""Sampling pictures from the policy, and what of it is kept for training.

Shapes: B pictures, K trained steps, C latent channels, h x w the latent grid.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from rl.keyed import keyed_generator
from rl.lora_dropout import DropoutKeys
from rl.policy import StableDiffusionPolicy
from rl.sde import Schedule, log_prob_map, step_mean
from rl.trunks import Trunks


class DivergedError(ValueError):
    """The policy itself is broken: what it draws, its loss or its weights are not finite. It is not the reward."""


@dataclass(frozen=True)
class Trajectory:
    """What training needs of B sampled pictures; only the K trained steps are kept.

    Attributes:
        steps: (K,) int64, the trained steps' indices into the schedule.
        latents: (K, B, C, h, w) float32, x_t before each trained step.
        next_latents: (K, B, C, h, w) float32, where the step went.
        log_probs: (K, B, h, w) float32, l(h, w) of having gone there (see `rl.sde`).
        final_latents: (B, C, h, w) float32, the clean latents, ready to be decoded.
    """

    steps: torch.Tensor
    latents: torch.Tensor
    next_latents: torch.Tensor
    log_probs: torch.Tensor
    final_latents: torch.Tensor


def shared_places(share: str, train_steps: Sequence[int], steps: int) -> list[int]:
    """Which of a picture's `steps` + 1 draws of noise all pictures of a group share.

    The first is the initial latent, the others belong to a step each. What does not depend on the trained steps'
    noise is, for their gradient, a baseline: shared, it cancels within the group, and the estimate stays unbiased.
    (Branching as in TempFlow-GRPO, arXiv 2508.04324.)

    Args:
        share: "none"; "before": the initial latent and the steps before the first trained one; "around": those behind
            the last trained one as well.
        train_steps: indices of the trained steps.
    """
    before = list(range(min(train_steps) + 1))
    return {"none": [], "before": before, "around": before + list(range(max(train_steps) + 2, steps + 1))}[share]


@torch.no_grad()
def sample(
    policy: StableDiffusionPolicy,
    network: nn.Module,
    prompts: Sequence[str],
    noise: torch.Tensor,
    schedule: Schedule,
    train_steps: Sequence[int] = (),
    guidance_scale: float = 1.0,
    train_guidance: bool = True,
    on_step: Callable[[], None] = lambda: None,
    trunks: Trunks | None = None,
    dropout_keys: DropoutKeys | None = None,
) -> Trajectory:
    """Sample one picture a prompt.

    Args:
        network: `policy.network` or the engine's wrapping of it; every rank must make the same number of calls.
        noise: (B, S + 1, C, h, w): the initial latent, then the noise of each of the S steps.
        train_steps: indices of the steps to keep; every one must have a std above 0.
        train_guidance: whether the log-probs kept are of the guided network, that drew, or of the one without guidance.
        on_step: called after every step.
        trunks: which pictures have the same prompt, keys and noise before the first trained step; None: none have.
        dropout_keys: see `StableDiffusionPolicy.drop_inputs`.
    """
    parting = min(train_steps, default=-1)
    conditioning = policy.drop_inputs(policy.encode(prompts), dropout_keys)
    # A policy from which pictures' own inputs are dropped is another for each, so there is none to fold.
    folded = policy.folded if conditioning.kept_inputs is None else nullcontext
    latents = noise[:, 0]
    kept: list[tuple[torch.Tensor, ...]] = []
    for trained, stretch in groupby(enumerate(schedule.timesteps.tolist()), lambda at: at[0] in train_steps):
        # A trained step must be computed as the update computes it, or the ratio would not be 1 on the first pass.
        with nullcontext() if trained else folded():
            for step, timestep in stretch:
                index = torch.full((len(prompts),), step, device=latents.device)
                timesteps = torch.full_like(index, timestep)
                one = trunks if step <= parting else None
                output = policy.predict(network, latents, timesteps, conditioning, guidance_scale, one)
                mean, std = step_mean(output, latents, index, schedule)
                next_latents = mean + std * noise[:, step + 1]
                if trained:
                    if guidance_scale != 1.0 and not train_guidance:
                        output = policy.predict(network, latents, timesteps, conditioning, trunks=one)
                        mean, std = step_mean(output, latents, index, schedule)
                    kept.append((latents, next_latents, log_prob_map(next_latents, mean, std)))
                latents = next_latents
                on_step()
    columns = [torch.stack(column) for column in zip(*kept, strict=True)] or [latents.new_empty(0)] * 3
    return Trajectory(torch.tensor(sorted(train_steps)), *columns, final_latents=latents)


def check_pictures(latents: torch.Tensor, images: torch.Tensor, prompts: Sequence[str], when: str) -> None:
    """Look whether latents (B, C, h, w) and images (B, 3, H, W) are finite.

    Raises:
        DivergedError: they are not; a prompt and `when` are named.
    """
    remedies = {
        "latents": "go on from an earlier checkpoint with a smaller learning_rate",
        "pictures": "its latents are, so the decoder overflows: with model_dtype float16, try bfloat16",
    }
    for what, values in (("latents", latents), ("pictures", images)):
        broken = ~values.isfinite().flatten(1).all(dim=1)
        if broken.any():
            raise DivergedError(
                f"the policy diverged: in {when} its {what} are not finite for the prompt "
                f"{prompts[int(broken.nonzero()[0])]!r} ({int(broken.sum())} of {len(prompts)} pictures), "
                f"which is not the reward's doing; {remedies[what]}"
            )


def draw_prompts(prompts: Sequence[str], count: int, rollout: int, seed: int) -> list[str]:
    """The `count` prompts of rollout number `rollout`: the list is gone through in a new random order each time round.

    Depends on its arguments only, so that a resumed run goes on where it stopped. With 5 prompts and `count` 3, rollout
    0 takes places 0-2 of the first order, rollout 1 places 3-4 of it and place 0 of the second, and so on.
    """
    drawn = []
    for position in range(rollout * count, (rollout + 1) * count):
        time_round, place = divmod(position, len(prompts))
        if place == 0 or not drawn:
            order = torch.randperm(len(prompts), generator=keyed_generator(seed, "prompts", time_round)).tolist()
        drawn.append(prompts[order[place]])
    return drawn
