"""The rewards of a comparison, still to be made: who judges, and whether two are one eye."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reward.by_name import NamedReward, check_reward_name, make_reward, make_weighted_reward, read_named_rewards
from reward.feedback import RewardFn
from rl.adapter import require

BASE = "base"
"""The policy before training, where a name is asked for."""
_NOT_THE_EYE = ("dtype", "device", "processor", "tokenizer", "prefix")
"""Arguments of rewards that are texts and do not say which model it is."""


@dataclass(frozen=True)
class Spec:
    """A reward that is still to be made: one by name, or a weighted sum of several; equal if it is the same."""

    named: tuple[tuple[str, str, str, float], ...]  # name, class, kwargs as JSON, weight; one with no name: by itself

    @classmethod
    def of(cls, reward: str, kwargs: Mapping[str, Any] | None = None) -> "Spec":
        return cls((("", reward, as_text(kwargs or {}), 1.0),))

    @classmethod
    def sum_of(cls, rewards: Mapping[str, Any]) -> "Spec":
        named = read_named_rewards("rewards", rewards, weights=True)
        return cls(tuple((name, one.reward, as_text(one.kwargs), one.weight) for name, one in named.items()))

    @property
    def key(self) -> str:
        """Short, and another one for another reward."""
        return hashlib.blake2b(json.dumps(self.named).encode(), digest_size=4).hexdigest()

    @property
    def eyes(self) -> set[tuple[str, str]]:
        """Class and models (the texts among its arguments) of each reward in it: who looks, whatever is weighed how."""
        found = set()
        for _, reward, kwargs, _ in self.named:
            texts = {
                name: value
                for name, value in json.loads(kwargs).items()
                if isinstance(value, str) and name not in _NOT_THE_EYE
            }
            found.add((reward, as_text(texts)))
        return found

    def make(self) -> RewardFn:
        """The reward function.

        Raises:
            ValueError: see `reward.by_name`.
        """
        if len(self.named) == 1 and not self.named[0][0]:
            return make_reward(self.named[0][1], json.loads(self.named[0][2]))
        named = {name: NamedReward(reward, json.loads(kwargs), weight) for name, reward, kwargs, weight in self.named}
        return make_weighted_reward(named)

    def check(self) -> None:
        """Complain about what could not be made; see `reward.by_name.check_reward_name`."""
        for _, reward, kwargs, _ in self.named:
            check_reward_name(reward, json.loads(kwargs))


@dataclass(frozen=True)
class Evaluator:
    """A column of the table.

    Attributes:
        term: which of the reward's terms it is; None: its objective.
    """

    name: str
    spec: Spec
    term: str | None = None


def read_evaluators(entries: Mapping[str, Any]) -> list[Evaluator]:
    """The evaluators that a YAML names.

    Raises:
        ValueError: an entry is none; see `reward.by_name`.
    """
    terms, bare = {}, {}
    for name, entry in entries.items():
        require(name != BASE, f"evaluators: {name!r} is the policy before training; choose another name")
        if isinstance(entry, Mapping) and "term" in entry:
            terms[name] = str(entry["term"])
            entry = {key: value for key, value in entry.items() if key != "term"}
        bare[name] = entry
    named = read_named_rewards("evaluators", bare, weights=False)
    return [Evaluator(name, Spec.of(one.reward, one.kwargs), terms.get(name)) for name, one in named.items()]


def as_text(value: Any) -> str:
    """The same for equal settings, whatever their order."""
    return json.dumps(value, sort_keys=True, default=str)
