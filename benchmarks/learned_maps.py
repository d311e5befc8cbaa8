"""A score as a sum over places: what it is made of is learned, and moved from a reward's total into a penalty map.

A score has no place; but most of what tells the scores of a prompt's pictures apart can be read, linearly, from the
predictor's image tokens after they saw the prompt (`unseen_share`). What each token says of it is then a map of where
the score comes from, and `credit: paid` lets every place pay for its own share: a baseline that depends on all that is
drawn far away, as in "Variance reduction for policy gradient with action-dependent factorized baselines", Wu et al.
2018, arXiv 1803.07246. The objective stays what it was.

Shapes: N pictures in groups of G pictures of one prompt, D channels of a token, g x k the grid of image tokens.
"""

from collections.abc import Sequence

import torch

from reward.feedback import Reward
from reward.rich import RichReward

STRENGTH = 100.0
"""Of the ridge, for features of unit variance; from 10 to 300 it explains as much of pictures that it has not seen."""


def seen_by(reward: RichReward, images: torch.Tensor, prompts: Sequence[str]) -> tuple[Reward, torch.Tensor]:
    """What a reward says of N pictures, and the tokens that its predictor's score heads read, (N, D, g, k)."""
    seen: list[torch.Tensor] = []
    (head, *_) = reward.predictor.model.score_heads.values()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float()))
    try:
        said = reward(images, prompts)
    finally:
        hook.remove()
    return said, torch.cat(seen)


def centred(values: torch.Tensor, group: int) -> torch.Tensor:
    """(N, ...) less the mean of each picture's group, in float64."""
    groups = values.double().unflatten(0, (-1, group))
    return (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)


def learn(tokens: torch.Tensor, totals: torch.Tensor, group: int) -> torch.Tensor:
    """The weights w (D,) with which the tokens' mean over places best tells apart the totals within a group.

    Args:
        tokens: (N, D, g, k).
        totals: (N,), the pictures of one prompt next to each other.
    """

    features, target = centred(tokens.mean(dim=(2, 3)), group), centred(totals, group)
    scale = features.std(dim=0).clamp(min=1e-9)
    features = features / scale
    square = features.T @ features + STRENGTH * torch.eye(features.shape[1]).to(features)
    return (torch.linalg.solve(square, features.T @ target) / scale).float()


def unseen_share(tokens: Sequence[torch.Tensor], totals: Sequence[torch.Tensor], group: int) -> float:
    """Which share of the variance of totals within groups is explained by weights learned from the other parts.

    Args:
        tokens, totals: of at least two parts, as `learn` takes each.
    """
    missed, whole = 0.0, 0.0
    for part in range(len(totals)):
        others = [other for other in range(len(totals)) if other != part]
        weights = learn(torch.cat([tokens[o] for o in others]), torch.cat([totals[o] for o in others]), group)
        target = centred(totals[part], group)
        said = centred(explained(tokens[part], weights).mean(dim=(1, 2)), group)
        missed, whole = missed + float((target - said).square().sum()), whole + float(target.square().sum())
    return 1 - missed / whole


def explained(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, D, g, k), (D,) -> (N, g, k), whose mean over places is what the weights say of a picture's total."""
    return torch.einsum("ndgk,d->ngk", tokens, weights)


class LearnedMaps:
    """A reward of the same objective, of whose total the explained part is a penalty map `learned`.

    A number that is the same for all pictures of a call is added to the map, for penalties are not negative, and to the
    total, so the pictures of a prompt are to be asked about together.

    Args:
        reward: whose scores are to be placed.
        weights: (D,), see `learn`.
    """

    differentiable = False

    def __init__(self, reward: RichReward, weights: torch.Tensor):
        self.reward, self.weights = reward, weights

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        said, tokens = seen_by(self.reward, images, prompts)
        placed = explained(tokens, self.weights)
        highest = placed.max()
        total = said.total - placed.mean(dim=(1, 2)) + highest
        return Reward(total, {**said.penalties, "learned": highest - placed}, said.word_penalties, said.terms)
