"""Which reward a command works with, as its settings name it: one, or a weighted sum of several."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from reward.by_name import (
    check_reward_name,
    find_attribute,
    make_reward,
    make_weighted_reward,
    read_named_rewards,
)
from reward.feedback import RewardFn
from rl.ddpo_checks import warn_of_ignored


@dataclass
class RewardArguments:
    """The reward, and rewards that only look on."""

    reward: str | None = field(
        default=None, metadata={"help": "The reward, `package.module:Attribute`; a class is called."}
    )
    reward_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of the reward's class."})
    rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "Instead of `reward`, a weighted sum: name -> {reward: `package.module:Attribute`, weight: 1.0, "
            "kwargs: {}}."
        },
    )
    eval_rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "More rewards that say what they think of the pictures, and change nothing: name -> "
            "`package.module:Attribute`, or {reward:, kwargs:}."
        },
    )

    def __post_init__(self):
        self.rewards, self.eval_rewards = self.rewards or {}, self.eval_rewards or {}
        if bool(self.reward) == bool(self.rewards):
            raise ValueError(
                "`reward` names one reward, `rewards` a weighted sum of several: "
                f"{'both are' if self.reward else 'neither is'} given; give one of them"
            )
        if self.rewards:
            warn_of_ignored(self, ("reward_kwargs",), "each of the `rewards` has kwargs of its own")
        self._entries("rewards", weights=True)
        self._entries("eval_rewards", weights=False)

    def _entries(self, setting: str, weights: bool) -> Mapping:
        return read_named_rewards(setting, getattr(self, setting), weights=weights)

    def check(self, differentiable: bool = False) -> None:
        """Complain about rewards that cannot be made, before any of them is.

        Args:
            differentiable: whether the reward must be; as far as its class says; `make` looks at the reward itself.

        Raises:
            ValueError: see `reward.by_name`; or the reward is not differentiable.
        """
        members = {entry.reward: entry.kwargs for entry in self._entries("rewards", weights=True).values()}
        members = members or {self.reward: self.reward_kwargs}
        for name, kwargs in members.items():
            check_reward_name(name, kwargs)
            if differentiable and getattr(find_attribute(name), "differentiable", None) is False:
                _refuse(name)
        for entry in self._entries("eval_rewards", weights=False).values():
            check_reward_name(entry.reward, entry.kwargs)

    def make(self, device: str, differentiable: bool = False) -> tuple[RewardFn, dict[str, RewardFn]]:
        """The reward, and those that only look on, by name; with their models on `device`.

        Raises:
            ValueError: as `check`.
        """
        if self.rewards:
            reward = make_weighted_reward(self._entries("rewards", weights=True))
        else:
            reward = make_reward(self.reward, self.reward_kwargs)
        if differentiable and not getattr(reward, "differentiable", False):
            _refuse(self.reward or ", ".join(self.rewards))
        others = self._entries("eval_rewards", weights=False).items()
        others = {name: make_reward(entry.reward, entry.kwargs) for name, entry in others}
        for one in (reward, *others.values()):
            if hasattr(one, "to"):
                one.to(device)
        return reward, others


def _refuse(name: str) -> None:
    raise ValueError(
        f"the reward {name} is not differentiable, so its gradient cannot guide; give one whose `differentiable` is "
        "true, such as reward.rich:RichReward"
    )
