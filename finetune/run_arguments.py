"""What every command that trains a policy is told besides its training's own settings, in parts to be put together.

Each part is a dataclass that checks itself; a command's own arguments inherit from those it needs, e.g.

    @dataclass(kw_only=True)
    class RunArguments(EvaluationArguments, PolicyArguments): ...

The first one's checks are made last.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reward.by_name import (
    NamedReward,
    check_reward_name,
    make_reward,
    make_weighted_reward,
    read_named_rewards,
)
from reward.feedback import RewardFn
from rl.evaluate import TRAINING_REWARD, HeldOut
from rl.policy_checks import warn_of_ignored


class _Part:
    """Where the parts' `super().__post_init__()` ends."""

    def __post_init__(self):
        pass


@dataclass(kw_only=True)
class PolicyArguments(_Part):
    """Which pipeline is trained."""

    policy: str = field(
        metadata={
            "help": "Folder of a Stable Diffusion pipeline (1.x, 2.x or XL) of diffusers, or the hub's name of one."
        }
    )


@dataclass(kw_only=True)
class RewardArguments(_Part):
    """The reward that counts: one by name, or a weighted sum of several."""

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

    def __post_init__(self):
        super().__post_init__()
        self.rewards = self.rewards or {}
        if bool(self.reward) == bool(self.rewards):
            which = "both are given" if self.reward else "neither is given"
            raise ValueError(
                f"`reward` names one reward, `rewards` a weighted sum of several: {which}; give one of them "
                "(on the command line, --reward '' or --rewards '{}' takes away what the YAML says)"
            )
        if self.rewards:
            warn_of_ignored(self, ("reward_kwargs",), "each of the `rewards` has kwargs of its own")
        read_named_rewards("rewards", self.rewards, weights=True)

    def named_rewards(self) -> list[NamedReward]:
        """The reward, or the members of the sum, before they are made."""
        if self.rewards:
            return list(read_named_rewards("rewards", self.rewards, weights=True).values())
        return [NamedReward(self.reward, self.reward_kwargs)]

    def make_reward(self) -> RewardFn:
        """The reward that counts.

        Raises:
            ValueError: see `reward.by_name`.
        """
        if self.rewards:
            return make_weighted_reward(read_named_rewards("rewards", self.rewards, weights=True))
        return make_reward(self.reward, self.reward_kwargs)


@dataclass(kw_only=True)
class EvaluationArguments(_Part):
    """How a policy is judged before and after, on prompts it is not trained on."""

    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts, a file like `prompts`; none: no evaluation."}
    )
    eval_rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "More rewards to evaluate by, never trained on: name -> `package.module:Attribute`, or {reward:, "
            "kwargs:}."
        },
    )
    eval_generations: int = field(default=2, metadata={"help": "Pictures of each held-out prompt."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the evaluation's noise, whatever `seed` is."})
    num_before_after: int = field(
        default=8, metadata={"help": "Pictures in before_after.png, and in each of the folder `samples`."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_rewards = self.eval_rewards or {}
        read_named_rewards("eval_rewards", self.eval_rewards, weights=False)
        if self.eval_generations < 1:
            raise ValueError(f"eval_generations is {self.eval_generations}; it must be at least 1")
        if self.num_before_after < 1:
            raise ValueError(f"num_before_after is {self.num_before_after}; it must be at least 1")
        if TRAINING_REWARD in self.eval_rewards:
            raise ValueError(
                f"eval_rewards must not use the name {TRAINING_REWARD!r}, the training reward's; rename it"
            )
        if not self.eval_prompts:
            names = ("eval_generations", "eval_seed", "num_before_after")
            names += () if self.eval_rewards_watch else ("eval_rewards",)
            warn_of_ignored(self, names, "there are no eval_prompts")

    def check_eval_strategy(self, eval_strategy: str) -> None:
        """Complain if evaluations in the midst of training are asked for and there is nothing to evaluate on."""
        if eval_strategy != "no" and not self.eval_prompts:
            raise ValueError(
                f"eval_strategy is {eval_strategy}, but there are no eval_prompts to evaluate on; name a file of "
                "held-out prompts, or set eval_strategy to no"
            )

    def held_out(self, prompts: Sequence[str], rewards: Mapping[str, RewardFn]) -> HeldOut:
        """What the policy is judged on; `rewards` has one called `TRAINING_REWARD`, if one is trained on."""
        return HeldOut(prompts, rewards, self.eval_generations, self.eval_seed, self.num_before_after)

    @property
    def eval_rewards_watch(self) -> bool:
        """Whether one of `eval_rewards` is asked during training too."""
        return False

    def make_eval_rewards(self) -> dict[str, RewardFn]:
        """Those to evaluate by, besides the one trained on; none is made before all are known to be.

        Raises:
            ValueError: see `reward.by_name`.
        """
        named = self.check_eval_rewards()
        return {name: make_reward(entry.reward, entry.kwargs) for name, entry in named.items()}

    def check_eval_rewards(self) -> dict[str, NamedReward]:
        """Complain about those that could not be made.

        Raises:
            ValueError: see `reward.by_name`.
        """
        named = read_named_rewards("eval_rewards", self.eval_rewards, weights=False)
        for entry in named.values():
            check_reward_name(entry.reward, entry.kwargs)
        return named


@dataclass(kw_only=True)
class RewardedRunArguments(EvaluationArguments, RewardArguments, PolicyArguments):
    """What a training that raises a reward on prompts is told: what is trained, on what, and how it is judged."""

    prompts: str = field(metadata={"help": "Training prompts: a UTF-8 text file, one a line."})
    watch_reward: str | None = field(
        default=None,
        metadata={
            "help": "One of `eval_rewards`, by name, that also looks at every rollout: the held-out reward that tells "
            "whether the trained one is gamed (rl/watch.py), and which checkpoint is the best."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.watch_reward and self.watch_reward not in self.eval_rewards:
            near = difflib.get_close_matches(self.watch_reward, self.eval_rewards, n=1, cutoff=0.0)
            raise ValueError(
                f"watch_reward: there is no {self.watch_reward!r} among the eval_rewards"
                + (f" (nearest name: {near[0]!r})" if near else "; name it there")
            )

    @property
    def eval_rewards_watch(self) -> bool:
        return bool(self.watch_reward)

    def check_stop_on(self, stop_on: Sequence[str]) -> None:
        """Complain if the run is to stop by a held-out reward that there is not."""
        for name in ("held_out", "agreement"):
            if name in stop_on and not self.watch_reward:
                raise ValueError(
                    f"stop_on names {name}, but there is no held-out reward: name one of eval_rewards, watch_reward"
                )

    def make_rewards(self) -> dict[str, RewardFn]:
        """The reward to train on, `TRAINING_REWARD`, and those to evaluate by; none is made before all are known to be.

        Raises:
            ValueError: see `reward.by_name`.
        """
        self.check_eval_rewards()
        return {TRAINING_REWARD: self.make_reward()} | self.make_eval_rewards()
