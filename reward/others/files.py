"""Where the weights of others come from, and how they are read: safely, and whole.

A name is a local folder or file, or the hub's: `owner/name` for a folder, `owner/name/file.pt` for one file. Nothing is
looked for on the hub before it is loaded. Pickles are read by `torch.load(weights_only=True)` only, which runs no code.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from reward.checks import model_type

_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_ON_HUB = re.compile(rf"({_ON_HUB.pattern})/([\w.+-]+\.(?:pt|pth|bin|safetensors))")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_IN_OLD_FILES = re.compile(r"(.*\.)?position_ids")  # counts 0, 1, 2, ..., which older libraries saved as weights
BROKEN = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)
"""What transformers, torch and the hub raise for files that are not there or not whole."""
_NAMED = 3

Model = TypeVar("Model", bound=PreTrainedModel)


# ---- Before anything is loaded ----


def check_folder(what: str, name: str | Path, kind: str | None = None, weights: bool = True) -> None:
    """Complain about a model folder that cannot be loaded, without loading it.

    Args:
        what: the folder's part in the message, such as "model".
        kind: the `model_type` that its config.json must state; None takes any.
        weights: whether it must hold weights.

    Raises:
        ValueError: no such folder, and no name on the hub either; a folder of another kind, or without weights; the
            hub is switched off (HF_HUB_OFFLINE) and its cache has no such model.
    """
    path = Path(name)
    if not path.is_dir():
        if path.exists() or not _ON_HUB.fullmatch(str(name)):
            raise ValueError(f"{what}: there is no folder {name}; give a model's folder, or the hub's name owner/name")
        if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            raise ValueError(
                f"{what}: {name} is no folder here, and the hub is switched off (HF_HUB_OFFLINE) and its cache has it "
                "not; give a folder, or fetch it with `hf download`"
            )
        return
    if kind is not None and model_type(path) != kind:
        raise ValueError(f"{what}: {path} holds a model of type {model_type(path)}, not {kind} (see its config.json)")
    if not (path / "config.json").is_file():
        raise ValueError(f"{what}: {path} has no config.json, so it is no model folder of transformers")
    if weights and not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
        raise ValueError(f"{what}: {path} holds no weights (model.safetensors or pytorch_model.bin)")


def check_file(what: str, name: str | Path) -> None:
    """Complain about a weights file that is not there, and is no file on the hub either (owner/name/file.pt).

    Raises:
        ValueError: names it.
    """
    if not Path(name).is_file() and not _FILE_ON_HUB.fullmatch(str(name)):
        raise ValueError(
            f"{what}: there is no file {name}; give a .pt, .pth, .bin or .safetensors, or the hub's owner/name/file.pt"
        )


# ---- Loading ----


def read_weights(name: str | Path, inside: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, by name, on the CPU.

    Args:
        name: local file, or the hub's `owner/name/file`.
        inside: where they may lie in a checkpoint that holds more; if there is no such entry, the file is taken whole.

    Raises:
        ValueError: it cannot be fetched or read, would run code when read, or holds something else than tensors.
    """
    path = Path(name)
    if not path.is_file():
        repository, file = _FILE_ON_HUB.fullmatch(str(name)).groups()
        try:
            path = Path(hf_hub_download(repository, file))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} is no file here and cannot be fetched from the hub: {first_line(error)}"
            ) from error
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is a pickle of more than tensors, which may run code when it is read, or is cut "
            "off. If you trust it, save its tensors as safetensors somewhere else and give that file"
        ) from error
    except BROKEN as error:
        raise ValueError(f"{path} cannot be read as weights ({first_line(error)}); fetch it again") from error
    if inside is not None and isinstance(found, Mapping) and isinstance(found.get(inside), Mapping):
        found = found[inside]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no mapping of names to tensors; is it the file of another model?")
    return dict(found)


def load_model(
    kind: type[Model],
    name: str | Path,
    config: PreTrainedConfig | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    partial: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Model:
    """A model of transformers with every weight it needs, in `dtype`.

    Args:
        name: its folder or name on the hub; with `weights` only the name of where they came from.
        config, weights: make it of these instead, by the names of `kind`.
        partial: whether `name` may hold more than `kind` has, e.g. the text half of a CLIP.

    Raises:
        ValueError: it cannot be fetched or read; weights are missing, of other shapes, or left over.
    """
    source = None if weights is not None else str(name)
    given = {} if weights is None else {"config": config, "state_dict": dict(weights)}
    try:
        model, report = kind.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype, **given, **options
        )
    except BROKEN as error:
        raise ValueError(f"{name} cannot be loaded as a {kind.__name__}: {first_line(error)}") from error
    _refuse_differences(
        str(name),
        report["missing_keys"],
        [] if partial else report["unexpected_keys"],
        [key for key, *_ in report["mismatched_keys"]],
    )
    return model


def load_tensors(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], name: str | Path) -> None:
    """Fill a module of ours with all of `weights`.

    Raises:
        ValueError: weights are missing, of other shapes, or left over.
    """
    own = module.state_dict()
    wrong = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    _refuse_differences(str(name), own.keys() - weights.keys(), weights.keys() - own.keys(), wrong)
    module.load_state_dict(dict(weights))


def _refuse_differences(
    name: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> None:
    unexpected = [key for key in unexpected if not _IN_OLD_FILES.fullmatch(key)]
    differences = {"lacks": missing, "has, beyond those known,": unexpected, "has in other sizes": mismatched}
    said = []
    for what, keys in differences.items():
        if keys := sorted(keys):
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            said.append(f"{what} the weights {', '.join(keys[:_NAMED])}{more}")
    if said:
        raise ValueError(f"{name} {'; it '.join(said)}: it is of another model, or of another version of it")


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
