"""Settings of every command: dataclasses filled from a YAML file and the command line; the flag wins.

    python -m reward.train --config configs/rahf_tinyworld.yaml --max_steps 200

`parse_arguments` is TRL's `TrlParser` (the parser TRL's and transformers' users know) with what it leaves to chance
closed: an unknown key or flag is an error that names the nearest valid one, `--config=FILE` works as `--config FILE`
does, flags are not abbreviated, values in the YAML are checked like flags are, and whatever is wrong is an
`ArgumentsError`, a `ValueError` with a message for the user, instead of a traceback or an exit inside the parser.

`read_prompt_file` reads the other thing that commands are given: prompts, one a line.

`main_guard` runs a command's `main`: a mistake of the user ends as one line on stderr and exit code 2.
"""

import difflib
import json
import logging
import os
import re
import signal
import sys
import traceback
import typing
from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from tqdm.auto import tqdm
from trl import TrlParser

logger = logging.getLogger(__name__)

_OUR_CODE = Path(__file__).resolve().parents[1]


class ArgumentsError(ValueError):
    """A setting is unknown, missing or malformed; the message says which, and what to write instead."""


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Fill `dataclass_types` from a YAML file (`--config FILE` or `--config=FILE`) and flags; flags win.

    Args:
        dataclass_types: dataclasses; no two may share a field name, none may have a field named `config`.
        argv: the command line without the program's name; `sys.argv[1:]` if None.

    Returns:
        One instance of each dataclass, in their order.

    Raises:
        ArgumentsError: config file missing, not UTF-8 or not a YAML mapping; unknown key or flag (the nearest valid
            name is given); a required setting absent; a value of the wrong type or outside its choices.
        ValueError: what the dataclasses' own `__post_init__` checks raise.

    A field of a mapping type is written as a mapping in YAML, and as JSON on the command line:
    `--score_weights '{"overall": 1.0}'`. An `env` mapping in the YAML sets environment variables, as in TRL.
    """
    flags, config_path = _split_off_config(list(sys.argv[1:] if argv is None else argv))
    parser = _Parser(list(dataclass_types), allow_abbrev=False)
    if config_path is not None:
        parser.set_defaults_from_yaml(config_path)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:  # making settings checks them, those of transformers too
        if _raised_by_us(error):
            raise
        raise ArgumentsError(str(error)) from error
    if unknown:
        named = [flag for flag in unknown if flag.startswith("-")] or unknown
        raise ArgumentsError(parser.unknown_names([flag.split("=")[0] for flag in named], "on the command line"))
    return tuple(parsed)


def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line. Blank lines are skipped, and a log line says how many.

    Raises:
        ValueError: no such file, not UTF-8, nothing but blank lines, or a line without a word.
    """
    try:
        # Only line ends end a line: prompts from the web hold other characters that `splitlines` would cut at.
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one a line")
    for number, line in enumerate(lines, start=1):
        if line.strip() and not re.search(r"\w", line):
            raise ValueError(f"line {number} of the prompt file {path} has no words: {line.strip()!r}; take it out")
    if len(prompts) < len(lines):
        logger.warning("%s: %d blank lines skipped, %d prompts", path, len(lines) - len(prompts), len(prompts))
    return prompts


def main_guard(
    main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None, tidy: bool = False
) -> NoReturn:
    """Run `main(argv)` as a command, then exit: 0 if all went well, 2 with one line on stderr if the user's input was
    wrong (a `ValueError` or `OSError` that our code raised on purpose), 130 on Ctrl-C. Anything else is a bug, ours or
    a library's, and keeps its traceback.

    `tidy` is for commands that work in a temporary folder: SIGTERM, too, then ends them (143) by way of `finally`. Not
    for trainings, whose ranks may wait for each other in a call that sees no Python, and must end there.
    """
    if tidy:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(argv)
    except KeyboardInterrupt:
        _tell("interrupted")
        sys.exit(130)
    except (ValueError, OSError) as error:
        said = _said_by_worker(error)
        if said is None and not (isinstance(error, ArgumentsError) or _raised_by_us(error)):
            raise
        _tell(f"error: {' '.join((said or str(error)).split())}")
        sys.exit(2)
    sys.exit(0)


def _tell(line: str) -> None:
    """A line of its own on stderr, even where a progress bar is open."""
    tqdm.write(line, file=sys.stderr)


def _raised_by_us(error: BaseException) -> bool:
    """Whether the statement that raised `error` stands in this repository, rather than inside a library."""
    return _is_ours(traceback.extract_tb(error.__traceback__)[-1].filename)


def _is_ours(file: str) -> bool:
    source = Path(file).resolve()
    return source.is_relative_to(_OUR_CODE) and "site-packages" not in source.parts


def _said_by_worker(error: BaseException) -> str | None:
    """What our code raised in a worker process of a data loader, of which torch keeps the traceback's text only, as the
    message of an error of the same type; None if `error` is no such one, or not ours."""
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return None
    raised_in = re.findall(r'^  File "(.+)", line \d+, in ', text, re.MULTILINE)
    _, mark, said = text.rpartition(f"\n{type(error).__name__}: ")
    return said if mark and raised_in and _is_ours(raised_in[-1]) else None


def _split_off_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Take `--config FILE` / `--config=FILE` out of `argv`; returns the other flags and the file, None if absent."""
    rest, path = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            if path is not None:
                raise ArgumentsError("--config is given twice; give one file, and single settings as flags")
            path = argument.partition("=")[2] if "=" in argument else next(arguments, "")
            if not path or path.startswith("--"):
                raise ArgumentsError("--config needs a file: --config FILE.yaml")
        else:
            rest.append(argument)
    return rest, path


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _NoTwins(yaml.SafeLoader):
    """`yaml.SafeLoader`, to which a key that is given twice is an error instead of its last value, and `1:3` a text:
    YAML 1.1 reads it as 63, in base 60."""

    def resolve(self, kind: type, value: str, implicit: object) -> str:
        tag = super().resolve(kind, value, implicit)
        return self.DEFAULT_SCALAR_TAG if tag in _NUMBERS and ":" in value else tag

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: list[object] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.YAMLError(f"{key.start_mark}: the key `{key.value}` is given twice; give it once")
            keys.append(key.value)
        return node


class _Parser(TrlParser):
    """`TrlParser` whose complaints are exceptions, and which reads mappings and checks YAML values."""

    def __init__(self, dataclass_types: list[type], **kwargs):
        super().__init__(dataclass_types, **kwargs)
        mappings = {
            name
            for dataclass_type in dataclass_types
            for name, hint in typing.get_type_hints(dataclass_type).items()
            if _is_mapping(hint)
        }
        for action in self._actions:
            if action.dest in mappings:
                action.type = _json_mapping

    def error(self, message: str) -> NoReturn:
        raise ArgumentsError(f"{message}; `--help` lists every setting")

    def valid_names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def unknown_names(self, names: Sequence[str], where: str) -> str:
        parts = []
        for name in names:
            bare = name.lstrip("-").replace("-", "_")
            near = difflib.get_close_matches(bare, self.valid_names(), n=1, cutoff=0.0)
            parts.append(f"`{name}`" + (f" (nearest valid name: `{near[0]}`)" if near else ""))
        return f"unknown setting {where}: {', '.join(parts)}; `--help` lists every setting"

    def set_defaults_from_yaml(self, path: str) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ArgumentsError(f"cannot read the config file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ArgumentsError(f"the config file {path} is not UTF-8 text: {error}") from error
        try:
            config = yaml.load(text, _NoTwins)
        except yaml.YAMLError as error:
            raise ArgumentsError(f"the config file {path} is not valid YAML: {error}") from error
        if not isinstance(config, dict):
            raise ArgumentsError(f"the config file {path} must be a YAML mapping `name: value`, not {config!r}")
        env = config.pop("env", None) or {}
        if not isinstance(env, dict):
            raise ArgumentsError(f"`env` in {path} must be a mapping of environment variables, not {env!r}")
        unknown = [str(key) for key in config if key not in self.valid_names()]
        if unknown:
            raise ArgumentsError(self.unknown_names(unknown, f"in {path}"))
        for action in self._actions:
            if action.dest in config:
                if action.nargs in ("+", "*") and not isinstance(config[action.dest], list | None):
                    config[action.dest] = [config[action.dest]]  # as a flag with one value
                self._check_yaml_value(action, config[action.dest], path)
        os.environ.update({str(key): str(value) for key, value in env.items()})
        self.set_defaults_with_config(**config)

    def _check_yaml_value(self, action: Action, value: object, path: str) -> None:
        """argparse converts and checks defaults that are strings only, and never checks their choices."""
        for item in value if isinstance(value, list) and action.nargs in ("+", "*") else [value]:
            if item is None:
                continue
            if action.type in (int, float) and not _is_number(item, action.type):
                raise ArgumentsError(f"`{action.dest}` in {path} must be {action.type.__name__}, not {item!r}")
            if action.type is _json_mapping and not isinstance(item, Mapping):
                raise ArgumentsError(f"`{action.dest}` in {path} must be a mapping, not {item!r}")
            if action.choices is not None and item not in action.choices:
                raise ArgumentsError(f"`{action.dest}` in {path} must be one of {list(action.choices)}, not {item!r}")


def _is_mapping(hint: object) -> bool:
    if typing.get_origin(hint) in (dict, Mapping) or hint in (dict, Mapping):
        return True
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return bool(members) and typing.get_origin(hint) not in (list, tuple) and all(map(_is_mapping, members))


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    try:  # YAML 1.1 reads `1e-3` as a string; argparse converts it
        return kind(value) == float(value)
    except (TypeError, ValueError):
        return False


def _json_mapping(text: str) -> dict:
    try:
        value = json.loads(text, object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(
            f"a mapping is written as JSON on the command line, {text!r} is not: {error}"
        ) from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"a JSON mapping is wanted, {text!r} is not one")
    return value


def _no_twins(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentTypeError(f"the key `{name}` is given twice; give it once")
    return dict(pairs)
