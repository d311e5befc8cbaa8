"""Asking a reward function for its opinion in batches, and refusing an opinion that is not a number.

Shapes: N pictures of H x W pixels.
"""

from collections.abc import Sequence

import torch

from reward.feedback import Reward, RewardFn


class RewardError(ValueError):
    """A reward function returned something that cannot be trained on."""


@torch.no_grad()
def score(reward_fn: RewardFn, images: torch.Tensor, prompts: Sequence[str], batch_size: int | None = None) -> Reward:
    """The reward of N pictures, asked for at most `batch_size` at a time.

    Args:
        images: (N, 3, H, W) in [0, 1].
        prompts: N prompts.

    Raises:
        RewardError: a term, the total or a penalty is not finite (the prompt and the term are named), a penalty is
            negative, or a shape does not fit.
    """
    batch_size = batch_size or len(prompts)
    parts = []
    for first in range(0, len(prompts), batch_size):
        chunk = list(prompts[first : first + batch_size])
        part = reward_fn(images[first : first + batch_size], chunk)
        check_reward(part, chunk)
        parts.append(part)
    return concatenate(parts)


def check_reward(reward: Reward, prompts: Sequence[str]) -> None:
    """Raises RewardError if `reward` cannot be trained on; see `score`."""
    count = len(prompts)
    values = {f"term `{name}`": value for name, value in reward.terms.items()}
    values |= {f"penalty map `{name}`": value for name, value in reward.penalties.items()}
    values["total"] = reward.total
    for name, value in values.items():
        dimensions = 3 if name.startswith("penalty") else 1
        if value.ndim != dimensions or len(value) != count:
            wanted = f"({count}, H, W)" if dimensions == 3 else f"({count},)"
            raise RewardError(f"the reward's {name} has shape {tuple(value.shape)} for {count} pictures, not {wanted}")
        broken = ~value.isfinite().view(count, -1).all(dim=1)
        if broken.any():
            index = int(broken.nonzero()[0])
            example = value[index].flatten()
            example = float(example[~example.isfinite()][0])
            raise RewardError(
                f"the reward's {name} is {example} for the prompt {prompts[index]!r} "
                f"({int(broken.sum())} of {count} pictures); it is not replaced by a number: mend the reward"
            )
        if dimensions == 3 and value.min() < 0:
            raise RewardError(f"the reward's {name} is negative ({float(value.min())}); penalties are costs, >= 0")
    if reward.word_penalties is not None and len(reward.word_penalties) != count:
        raise RewardError(f"the reward has word penalties for {len(reward.word_penalties)} pictures, not {count}")


def concatenate(rewards: Sequence[Reward]) -> Reward:
    """One Reward of all pictures, from Rewards of some each; all must have the same terms and maps."""
    if len(rewards) == 1:
        return rewards[0]
    words = [words for reward in rewards for words in reward.word_penalties or ()]
    return Reward(
        total=torch.cat([reward.total for reward in rewards]),
        penalties={name: torch.cat([reward.penalties[name] for reward in rewards]) for name in rewards[0].penalties},
        word_penalties=words if rewards[0].word_penalties is not None else None,
        terms={name: torch.cat([reward.terms[name] for reward in rewards]) for name in rewards[0].terms},
    )
