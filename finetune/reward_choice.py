"""Which reward a command works with, as its settings name it: one, or a weighted sum of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune import run_arguments
from reward.by_name import NamedReward, check_reward_name, find_attribute, make_reward, read_named_rewards
from reward.feedback import RewardFn


@dataclass(kw_only=True)
class RewardArguments(run_arguments.RewardArguments):
    """The reward, and rewards that only look on."""

    eval_rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "More rewards that say what they think of the pictures, and change nothing: name -> "
            "`package.module:Attribute`, or {reward:, kwargs:}."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_rewards = self.eval_rewards or {}
        self._looking_on()

    def _looking_on(self) -> Mapping[str, NamedReward]:
        return read_named_rewards("eval_rewards", self.eval_rewards, weights=False)

    def check(self, differentiable: bool = False) -> None:
        """Complain about rewards that cannot be made, before any of them is.

        Args:
            differentiable: whether the reward must be; as far as its class says; `make` looks at the reward itself.

        Raises:
            ValueError: see `reward.by_name`; or the reward is not differentiable.
        """
        for entry in self.named_rewards():
            check_reward_name(entry.reward, entry.kwargs)
            if differentiable and getattr(find_attribute(entry.reward), "differentiable", None) is False:
                _refuse(entry.reward)
        for entry in self._looking_on().values():
            check_reward_name(entry.reward, entry.kwargs)

    def make(self, device: str, differentiable: bool = False) -> tuple[RewardFn, dict[str, RewardFn]]:
        """The reward, and those that only look on, by name; with their models on `device`.

        Raises:
            ValueError: as `check`.
        """
        reward = self.make_reward()
        if differentiable and not getattr(reward, "differentiable", False):
            _refuse(self.reward or ", ".join(self.rewards))
        others = {name: make_reward(entry.reward, entry.kwargs) for name, entry in self._looking_on().items()}
        for one in (reward, *others.values()):
            if hasattr(one, "to"):
                one.to(device)
        return reward, others


def given_by(rewards: Sequence[NamedReward]) -> set[str] | None:
    """Which of `Reward`'s `penalties` and `word_penalties` a reward, or the weighted sum of several, has; none is made.

    A reward's class says so if it has a class method `gives`, which is called with the arguments of the reward.

    Returns:
        None if one of them does not say.

    Raises:
        ValueError: see `reward.by_name.check_reward_name`; or what a `gives` refuses.
    """
    for entry in rewards:
        check_reward_name(entry.reward, entry.kwargs)
    asked = [(getattr(find_attribute(entry.reward), "gives", None), entry) for entry in rewards]
    if any(gives is None for gives, _ in asked):
        return None
    return set().union(*(gives(**entry.kwargs) for gives, entry in asked if entry.weight))


def _refuse(name: str) -> None:
    raise ValueError(
        f"the reward {name} is not differentiable, so its gradient cannot guide; give one whose `differentiable` is "
        "true, such as reward.rich:RichReward"
    )


def split_terms(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rewards as a YAML names them, without the `term` that is asked for in place of the objective; and these terms, by
    the rewards' names."""
    bare, terms = {}, {}
    for name, entry in entries.items():
        if isinstance(entry, Mapping) and "term" in entry:
            terms[name] = str(entry["term"])
            entry = {key: value for key, value in entry.items() if key != "term"}
        bare[name] = entry
    return bare, terms
