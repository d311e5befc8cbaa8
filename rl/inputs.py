"""What a run is given by name: reward functions."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from reward.feedback import RewardFn


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


def make_reward(name: str, kwargs: Mapping[str, Any] | None = None) -> RewardFn:
    """The reward function that `package.module:Attribute` names: a class is called with `kwargs`, anything else is it.

    Raises:
        ValueError: see `find_attribute`; `kwargs` that the class does not take, or given to what is not a class; what
            comes out cannot be called.
    """
    attribute = find_attribute(name)
    kwargs = dict(kwargs or {})
    if not inspect.isclass(attribute):
        if kwargs:
            raise ValueError(f"{name} is not a class, so it takes no arguments, but {kwargs} are given")
        return _callable(name, attribute)
    try:
        inspect.signature(attribute).bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be called with the arguments {kwargs}: {error}; it takes {inspect.signature(attribute)}"
        ) from error
    return _callable(name, attribute(**kwargs))


def _callable(name: str, reward: Any) -> RewardFn:
    if not callable(reward):
        raise ValueError(
            f"{name} is a {type(reward).__name__}, which cannot be called; "
            "a reward takes images (B, 3, H, W) and prompts and returns a reward.feedback.Reward"
        )
    return reward
