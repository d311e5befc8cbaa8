"""What a run is given by name: prompt files and reward functions."""

import importlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward.feedback import RewardFn

logger = logging.getLogger(__name__)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line. Blank lines are skipped, and a log line says how many.

    Raises:
        ValueError: no such file, not UTF-8, or nothing but blank lines.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one a line")
    if len(prompts) < len(lines):
        logger.warning("%s: %d blank lines skipped, %d prompts", path, len(lines) - len(prompts), len(prompts))
    return prompts


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
