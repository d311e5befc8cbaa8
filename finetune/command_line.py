"""Settings as the flags of a command."""

import json
from collections.abc import Mapping
from typing import Any


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """What `reward.arguments.parse_arguments` reads as `settings`: lists as several values, mappings as JSON.

    >>> as_flags({"train_steps": [1, 2], "reward_kwargs": {"weight": 2}})
    ['--train_steps', '1', '2', '--reward_kwargs', '{"weight": 2}']
    """
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name}", *(json.dumps(one) if isinstance(one, Mapping) else str(one) for one in values)]
    return flags
