"""Reward functions by name, as a YAML names them: `package.module:Attribute`, alone or several with weights.

rewards:
  rich: {reward: "reward.rich:RichReward", weight: 1.0, kwargs: {model: outputs/rahf}}
  red: {reward: "my_rewards:Redness", weight: 0.1}
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward.feedback import RewardFn
from reward.weighted import WeightedReward


@dataclass(frozen=True)
class NamedReward:
    """A reward that is still to be made.

    Attributes:
        reward: `package.module:Attribute`.
        kwargs: arguments of its class.
        weight: its weight among several.
    """

    reward: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


def find_attribute(name: str) -> Any:
    """What `package.module:Attribute` names. Importing runs that module's code: only name what you trust.

    Raises:
        ValueError: the name is not of that form, or there is no such module or attribute.
    """
    module_name, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{name!r} does not name a reward; write `package.module:Attribute`")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module is there, and something it needs is not
        raise ValueError(f"{name!r}: there is no module {module_name}; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name!r}: the module {module_name} has no attribute {attribute}")
    return getattr(module, attribute)


def check_reward_name(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Complain about what `make_reward` could not make, without making it: a class may load a model.

    Raises:
        ValueError: see `find_attribute`; `kwargs` that the class does not take, or given to what is not a class; what
            is named cannot be called with pictures and prompts; what a `lazy` class says of its arguments.
    """
    attribute = find_attribute(name)
    kwargs = dict(kwargs or {})
    if not inspect.isclass(attribute):
        if kwargs:
            raise ValueError(f"{name} is not a class, so it takes no arguments, but {kwargs} are given")
        _check_callable(name, attribute)
        return
    if any("__call__" in vars(base) for base in attribute.__mro__):
        _check_takes_two(name, attribute.__call__, "self")
    try:
        signature = inspect.signature(attribute)
    except ValueError:  # some that are written in C have none
        raise ValueError(f"{name} does not say what arguments it takes, so it is no reward") from None
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be called with the arguments {kwargs}: {error}; it takes {signature}"
        ) from error
    if getattr(attribute, "lazy", False):
        attribute(**kwargs)


def make_reward(name: str, kwargs: Mapping[str, Any] | None = None) -> RewardFn:
    """The reward function that `package.module:Attribute` names: a class is called with `kwargs`, anything else is it.

    Raises:
        ValueError: see `check_reward_name`.
    """
    check_reward_name(name, kwargs)
    attribute = find_attribute(name)
    reward = attribute(**(kwargs or {})) if inspect.isclass(attribute) else attribute
    _check_callable(name, reward)
    return reward


def make_weighted_reward(rewards: Mapping[str, NamedReward]) -> WeightedReward:
    """The weighted sum of rewards, by name; see `reward.weighted`.

    Raises:
        ValueError: see `check_reward_name`; all of them are looked at before the first is made.
    """
    for entry in rewards.values():
        check_reward_name(entry.reward, entry.kwargs)
    return WeightedReward(
        {name: make_reward(entry.reward, entry.kwargs) for name, entry in rewards.items()},
        {name: entry.weight for name, entry in rewards.items()},
    )


def read_named_rewards(setting: str, entries: Mapping[str, Any], weights: bool) -> dict[str, NamedReward]:
    """What a setting says of several rewards: name -> `package.module:Attribute`, or {reward:, kwargs:, weight:}.

    Args:
        setting: the setting's name, for messages.
        weights: whether its rewards have weights (1 where none is given).

    Raises:
        ValueError: an entry of another form, with an unknown key (the nearest valid one is named), without `reward`,
            or with a weight that is no finite number; a name that is no text, or has a dot where there are weights.
    """
    valid = ("reward", "kwargs", "weight") if weights else ("reward", "kwargs")
    form = f"write `package.module:Attribute` or a mapping of {', '.join(valid)}"
    named = {}
    for name, entry in entries.items():
        place = f"{setting}: {name!r}"
        if not isinstance(name, str) or not name or (weights and "." in name):
            raise ValueError(f"{place} cannot be a reward's name; give it a text without dots")
        if not isinstance(entry, Mapping):
            entry = {"reward": entry}
        for key in entry:
            if key not in valid:
                (near,) = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
                raise ValueError(f"{place} has the unknown key {key!r} (nearest valid one: {near!r}); {form}")
        if not isinstance(entry.get("reward"), str):
            raise ValueError(f"{place}: {entry.get('reward')!r} does not name a reward; {form}")
        kwargs = entry.get("kwargs") or {}
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"{place}: its kwargs must be a mapping, not {kwargs!r}")
        named[name] = NamedReward(entry["reward"], kwargs, _read_weight(place, entry.get("weight", 1.0)))
    return named


def _read_weight(place: str, weight: Any) -> float:
    try:  # YAML 1.1 reads `1e-3` as a text
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}: its weight is {weight!r}; it must be a finite number")
    return number


_A_REWARD = "a reward takes images (B, 3, H, W) and prompts and returns a reward.feedback.Reward"


def _check_callable(name: str, reward: Any) -> None:
    """Complain about what cannot be called with pictures and prompts.

    Raises:
        ValueError: it is that.
    """
    if not callable(reward):
        raise ValueError(f"{name} is a {type(reward).__name__}, which cannot be called; {_A_REWARD}")
    _check_takes_two(name, reward)


def _check_takes_two(name: str, call: Any, *before: object) -> None:
    """Complain if `call` does not take pictures and prompts behind the arguments `before`.

    Raises:
        ValueError: it does not.
    """
    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):  # some that are written in C have none; they will be heard when they are called
        return
    try:
        signature.bind(*before, "images", "prompts")
    except TypeError as error:
        raise ValueError(f"{name} takes {signature}; {_A_REWARD}") from error
