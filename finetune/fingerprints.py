"""Which weights a folder holds, and which code is at work. Names do not say: a model that is trained anew may take the
old one's place."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.adapter import LORA_WEIGHTS

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_SUFFIXES = (".json", ".model", *_WEIGHTS)
_OF_A_RUN = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)(_\d+)?\.(pt|pth|bin)")
"""What a Trainer leaves beside the weights to go on from; another run to the same weights leaves others."""
_WEIGHTS_OF = "weights of "
_ROOT, _ROOMS = Path(__file__).parents[1], ("finetune", "reward", "rl", "tinyworld")


def fingerprint(model: str | Path) -> str:
    """Twelve digits that differ where the files of a checkpoint, a pipeline or a LoRA do, or one file of weights."""
    model = Path(model)
    digest = hashlib.sha256()
    for file in _files(model):
        digest.update(file.relative_to(model).as_posix().encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def code() -> str:
    """Twelve digits that differ where the toolkit's own Python files do."""
    digest = hashlib.sha256()
    for file in [_ROOT / "run_ddpo.py", *sorted(file for room in _ROOMS for file in (_ROOT / room).rglob("*.py"))]:
        digest.update(file.relative_to(_ROOT).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def weights_of(*settings: Any) -> dict[str, str]:
    """`weights of <path>` -> fingerprint, for every model on this disk that settings name.

    Args:
        settings: texts, or mappings and lists with texts in them; those that name no model here are passed over, as
            names on the hub are.
    """
    return {f"{_WEIGHTS_OF}{path}": fingerprint(path) for path in dict.fromkeys(_texts(settings)) if _files(Path(path))}


def with_weights(known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `known` of results whose weights were not noted, as earlier versions did not: taken for those of
    `now`, so that such results can still be gone on with."""
    return {name: value for name, value in now.items() if is_weights(name)} | dict(known)


def is_weights(name: str) -> bool:
    """Whether it is a name that `weights_of` gives."""
    return name.startswith(_WEIGHTS_OF)


def _files(model: Path) -> list[Path]:
    """What decides what a model does, in a fixed order; empty where there is none."""
    if model.is_file():
        return [model] if model.suffix in _WEIGHTS else []
    if (model / LORA_WEIGHTS).is_file():  # what else a run has left there may change
        return [model / LORA_WEIGHTS]
    folders = [model]
    if (index := model / "model_index.json").is_file():
        folders += [model / part for part in json.loads(index.read_text(encoding="utf-8"))]
    found = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file()]
    return sorted(file for file in found if file.suffix in _SUFFIXES and not _OF_A_RUN.fullmatch(file.name))


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, Mapping):
        yield from _texts(list(settings.values()))
    elif isinstance(settings, Sequence):
        for one in settings:
            yield from _texts(one)
