"""Asking a reward function for its opinion in batches, and refusing an opinion that is not a number.

Shapes: N pictures of H x W pixels.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from reward.feedback import Reward, RewardError, RewardFn, check_reward

__all__ = ["RewardError", "ask", "concatenate", "features", "left_out", "score"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def score(reward_fn: RewardFn, images: torch.Tensor, prompts: Sequence[str], batch_size: int | None = None) -> Reward:
    """What `ask` gives, without gradients."""
    return ask(reward_fn, images, prompts, batch_size)


def ask(reward_fn: RewardFn, images: torch.Tensor, prompts: Sequence[str], batch_size: int | None = None) -> Reward:
    """The reward of N pictures, asked for at most `batch_size` at a time, with gradients if they are enabled.

    It sees them contiguous, as a decoder's are not, so that it may `view` them; and works in its own precision,
    whatever autocast surrounds it: a run's bfloat16 would round away what tells the pictures of a prompt from each
    other.

    Args:
        images: (N, 3, H, W) in [0, 1].
        prompts: N prompts.

    Raises:
        RewardError: a term, the total or a penalty is not finite (the prompt and the term are named), a penalty is
            negative, or a shape does not fit; batches have different terms or maps.
    """
    batch_size = batch_size or len(prompts)
    parts = []
    for first in range(0, len(prompts), batch_size):
        chunk = list(prompts[first : first + batch_size])
        with torch.autocast(images.device.type, enabled=False):
            part = reward_fn(images[first : first + batch_size].contiguous(), chunk)
        check_reward(part, chunk)
        parts.append(part)
    return concatenate(parts)


@torch.no_grad()
def features(reward_fn: RewardFn, images: torch.Tensor, batch_size: int | None = None) -> torch.Tensor | None:
    """What the reward sees in N pictures (N, 3, H, W), (N, D) float32, as `ask`; None if it does not say.

    Raises:
        RewardError: its features are of another shape, or not finite.
    """
    if not hasattr(reward_fn, "features"):
        return None
    batch_size = batch_size or len(images)
    with torch.autocast(images.device.type, enabled=False):
        chunks = images.contiguous().split(batch_size)
        parts = [reward_fn.features(chunk) for chunk in chunks]
    found = torch.cat(parts).float().to(images.device)
    if found.ndim != 2 or len(found) != len(images) or not found.isfinite().all():
        raise RewardError(
            f"the reward's features are to be finite, ({len(images)}, D), for {len(images)} pictures; "
            f"these have the shape {tuple(found.shape)}"
        )
    return found


def left_out(reward: str, error: Exception) -> str:
    """Log that a reward failed, and say why in a line. Where it failed is logged too, for the message of an error that
    nobody expected may say little without it.

    Args:
        reward: its name.
        error: whatever it raised.
    """
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    logger.warning(
        "the reward %s failed, and is left out: %s", reward, said, exc_info=not isinstance(error, ValueError)
    )
    return said


def concatenate(rewards: Sequence[Reward]) -> Reward:
    """One Reward of all pictures, from Rewards of some each; all must have the same terms, and maps of the same sizes.

    Raises:
        RewardError: they have not.
    """
    if len(rewards) == 1:
        return rewards[0]
    return Reward(
        total=torch.cat([reward.total for reward in rewards]),
        penalties=_join("penalty maps", [reward.penalties for reward in rewards]),
        word_penalties=_chain([reward.word_penalties for reward in rewards]),
        terms=_join("terms", [reward.terms for reward in rewards]),
        wrong_words=_chain([reward.wrong_words for reward in rewards]),
        heatmaps=_join("heatmaps", [reward.heatmaps for reward in rewards]),
    )


def _chain(parts: Sequence[Sequence[torch.Tensor] | None]) -> list[torch.Tensor] | None:
    return None if parts[0] is None else [words for part in parts for words in part or ()]


def _join(what: str, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    shapes = [{name: tuple(value.shape[1:]) for name, value in part.items()} for part in parts]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise RewardError(
                f"the reward's {what} differ from batch to batch ({shapes[0]}, then {other}); "
                "give the same names and sizes every time"
            )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
