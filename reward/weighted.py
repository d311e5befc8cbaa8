"""Several rewards as one: their weighted sum.

Shapes: B images of H x W pixels, T the words of a prompt.
"""

from collections.abc import Mapping, Sequence

import torch

from reward.feedback import Reward, RewardError, RewardFn, check_reward


class WeightedReward:
    """The weighted sum of reward functions, in whose terms and maps each keeps its name.

    For members m of weight w[m]:

        total            = sum of w[m] * total[m]
        penalties        = `m.<map>`: w[m] times the member's map, in its own size; none of a weight of 0
        word_penalties   = sum of w[m] * word_penalties[m], over the members that have them
        wrong_words      = those of any member with a weight above 0
        heatmaps         = `m.<map>`: the member's, as it is; none of a weight of 0 or less
        terms            = `m`: the member's objective before weighting; `m.<term>`: its terms

    so that the sum's objective is the sum of w[m] times the members' objectives. It is differentiable if all members
    are. Of its members' optional attributes it has `features`, the first one's that has it, and `ranges` (see
    `reward.feedback.RewardFn`).

    Args:
        members: name -> reward function, at least one.
        weights: name -> finite weight. Penalties are costs, so a member of negative weight must have none.
    """

    def __init__(self, members: Mapping[str, RewardFn], weights: Mapping[str, float]):
        if not members:
            raise ValueError("there is no reward to weigh; name at least one")
        if set(members) != set(weights):
            raise ValueError(f"there are rewards {sorted(members)}, but weights of {sorted(weights)}")
        self.members, self.weights = dict(members), dict(weights)
        self.differentiable = all(getattr(member, "differentiable", False) for member in members.values())
        self.ranges = {
            f"{name}.{term}": limits
            for name, member in members.items()
            for term, limits in getattr(member, "ranges", {}).items()
            if weights[name]
        }
        for member in members.values():
            if hasattr(member, "features"):
                self.features = member.features
                break

    def to(self, device: str | torch.device) -> "WeightedReward":
        for member in self.members.values():
            if hasattr(member, "to"):
                member.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`; see the class.

        Raises:
            RewardError: a member's reward cannot be trained on (the member is named), or has penalties and a negative
                weight.
        """
        total = torch.zeros(len(images), device=images.device)
        penalties, heatmaps, terms, words, wrong = {}, {}, {}, None, None
        for name, member in self.members.items():
            weight, reward = self.weights[name], member(images, prompts)
            self._check(name, reward, prompts)
            total = total + weight * reward.total.to(images.device)
            if weight:
                penalties |= {
                    f"{name}.{which}": weight * maps.to(images.device) for which, maps in reward.penalties.items()
                }
            if reward.word_penalties is not None:
                words = _add_words(name, words, [weight * value.to(images.device) for value in reward.word_penalties])
            if weight > 0:
                heatmaps |= {f"{name}.{which}": maps for which, maps in reward.heatmaps.items()}
            if reward.wrong_words is not None and weight > 0:
                wrong = _add_words(name, wrong, [value.to(images.device) for value in reward.wrong_words])
            terms[name] = reward.objective
            terms |= {f"{name}.{term}": value for term, value in reward.terms.items()}
        return Reward(total, penalties, words, terms, wrong, heatmaps)

    def _check(self, name: str, reward: Reward, prompts: Sequence[str]) -> None:
        try:
            check_reward(reward, prompts)
        except RewardError as error:
            raise RewardError(f"{name}: {error}") from error
        if self.weights[name] < 0 and (reward.penalties or reward.word_penalties is not None):
            raise RewardError(
                f"{name} has a weight of {self.weights[name]} and penalties, which are costs and cannot be turned into "
                "gains: give it a weight of at least 0, or take its penalties away"
            )


def _add_words(name: str, so_far: list[torch.Tensor] | None, words: list[torch.Tensor]) -> list[torch.Tensor]:
    """Costs are summed; of booleans it is the union."""
    if so_far is None:
        return words
    for one, other in zip(so_far, words, strict=True):
        if one.shape != other.shape:
            raise RewardError(
                f"{name} tells of {len(other)} words of a prompt in which another reward sees {len(one)}; "
                "words are those of reward.feedback.tokenize"
            )
    return [one + other for one, other in zip(so_far, words, strict=True)]
