"""The rewards of a comparison, still to be made: who judges, and whether two are one eye."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.reward_choice import split_terms
from reward.by_name import (
    NamedReward,
    check_reward_name,
    find_attribute,
    make_reward,
    make_weighted_reward,
    read_named_rewards,
)
from reward.feedback import RewardFn
from rl.adapter import require

BASE = "base"
"""The policy before training, where a name is asked for."""
_NOT_THE_EYE = ("dtype", "device", "processor", "tokenizer", "prefix")
"""Arguments that are texts and do not say which model it is, of rewards that have no argument `model`."""


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
    def eyes(self) -> set[tuple[int, str]]:
        """Class and model of each reward in it: who looks, whatever is weighed or asked how, however it is spelled.

        Raises:
            ValueError: see `reward.by_name.find_attribute`.
        """
        return {_eye(reward, json.loads(kwargs)) for _, reward, kwargs, _ in self.named}

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


def _eye(reward: str, kwargs: Mapping[str, Any]) -> tuple[int, str]:
    """The class itself, as it may be imported from several modules, and its argument `model`; where it has none, the
    texts among its arguments."""
    attribute = find_attribute(reward)
    if inspect.isclass(attribute):
        parameters = inspect.signature(attribute).parameters.values()
        kwargs = {one.name: one.default for one in parameters} | dict(kwargs)
    texts = {name: _place(value) for name, value in kwargs.items() if isinstance(value, str)}
    chosen = ("model",) if "model" in texts else sorted(texts.keys() - set(_NOT_THE_EYE))
    return id(attribute), as_text({name: texts[name] for name in chosen})  # not all that can be called can be hashed


def _place(text: str) -> str:
    """One text for all ways to write a path that exists; names on the hub are left as they are."""
    return os.path.realpath(text) if os.path.exists(text) else text


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
    require(BASE not in entries, f"evaluators: {BASE!r} is the policy before training; choose another name")
    bare, terms = split_terms(entries)
    named = read_named_rewards("evaluators", bare, weights=False)
    return [Evaluator(name, Spec.of(one.reward, one.kwargs), terms.get(name)) for name, one in named.items()]


def as_text(value: Any) -> str:
    """The same for equal settings, whatever their order."""
    return json.dumps(value, sort_keys=True, default=str)
