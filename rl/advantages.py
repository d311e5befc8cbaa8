"""How good a picture was compared with others. Pure functions, and the one memory that a comparison may have.

Shapes: N pictures, in groups of G pictures of one prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

BASELINES = ("group", "prompt", "batch")

Scale = Literal["group", "batch", "none"]


def group_advantages(
    values: torch.Tensor,
    group_size: int,
    std_floor: float,
    clip: float | None = None,
    scale: Scale = "group",
) -> torch.Tensor:
    """z-score of each value within its group: A = (R - mean of the group) / max(std, `std_floor`).

    As in GRPO ("DeepSeekMath", Shao et al. 2024, arXiv 2402.03300, section 4.1), with a floor instead of a small
    addend: a group whose pictures are equally good says little, and its noise is not blown up.

    Args:
        values: (N,), the pictures of one prompt next to each other, N a multiple of `group_size`.
        group_size: G, at least 2; N compares all pictures of the rollout with each other.
        std_floor: smallest std (population's, dividing by G) that is divided by, in units of the reward.
        clip: advantages are clamped to +- this; None does not.
        scale: what the std is taken over: each group, the whole batch (root mean square of the differences from the
            group's mean), or "none": no division.

    Returns:
        (N,) float32, mean 0 in each group before clipping.
    """
    assert group_size >= 2, group_size
    assert len(values) % group_size == 0, (len(values), group_size)
    groups = values.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=std_floor)
    elif scale == "batch":
        centred = centred / centred.square().mean().sqrt().clamp(min=std_floor)
    return _clipped(centred.flatten(), clip)


def keep_groups_that_differ(
    advantages: torch.Tensor, values: torch.Tensor, group_size: int, min_std: float
) -> tuple[torch.Tensor, float]:
    """Skip the groups whose values are all alike, and let the others stand for them.

    As the dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2), without drawing anew: the loss
    becomes the mean over the pictures that are kept.

    Args:
        advantages, values: (N,).
        min_std: groups whose std (population's) is not above it are skipped.

    Returns:
        advantages (N,), 0 in skipped groups, the others times N / (number kept); and the share of groups skipped.
    """
    kept = values.float().view(-1, group_size).std(dim=1, correction=0) > min_std
    share = float(kept.float().mean())
    return advantages * kept.repeat_interleave(group_size) / max(share, 1 / len(kept)), 1 - share


class PromptStatistics:
    """A running mean and std of the rewards of each prompt, over rollouts: a baseline that needs no group.

    As ddpo-pytorch's and TRL's `PerPromptStatTracker` (Black et al. 2023, arXiv 2305.13301, section 5.1): a prompt's
    last `buffer_size` rewards, the newest included; one that has been seen less than `min_count` times is compared with
    the rollout.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size, self.min_count = buffer_size, min_count
        self._rewards: dict[str, list[float]] = {}

    def advantages(
        self,
        prompts: Sequence[str],
        values: torch.Tensor,
        std_floor: float,
        clip: float | None = None,
        scale: Scale = "group",
    ) -> torch.Tensor:
        """Take in the rewards of one rollout, and compare each with its prompt's.

        Args:
            prompts: N prompts, of all ranks.
            values: (N,).
            scale: what is divided by: "group": the std of what a picture is compared with; "batch": the root mean
                square of all differences; "none".

        Returns:
            (N,) float32.
        """
        known = values.double().cpu()
        for prompt, value in zip(prompts, known.tolist(), strict=True):
            self._rewards[prompt] = [*self._rewards.get(prompt, ()), value][-self.buffer_size :]
        means, stds = (
            torch.full_like(known, float(known.mean())),
            torch.full_like(known, float(known.std(correction=0))),
        )
        for place, prompt in enumerate(prompts):
            seen = torch.tensor(self._rewards[prompt], dtype=torch.float64)
            if len(seen) >= self.min_count:
                means[place], stds[place] = seen.mean(), seen.std(correction=0)
        centred = known - means
        if scale == "group":
            centred = centred / stds.clamp(min=std_floor)
        elif scale == "batch":
            centred = centred / centred.square().mean().sqrt().clamp(min=std_floor)
        return _clipped(centred.float().to(values.device), clip)

    def state(self) -> dict[str, list[float]]:
        """Prompt -> its rewards, oldest first; JSON keeps them to the bit."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        self._rewards = {prompt: list(rewards) for prompt, rewards in state.items()}


def _clipped(advantages: torch.Tensor, clip: float | None) -> torch.Tensor:
    return advantages if clip is None else advantages.clamp(-clip, clip)
