"""What the files of a pipeline folder's parts must be, looked into before anything is loaded from them.

diffusers and transformers say too little: a tokenizer without its vocabulary loads as an empty one, which encodes every
prompt alike; weights that are cut off end in an error that does not name their file.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_VOCABULARY = ("tokenizer.json",), ("vocab.json", "merges.txt")


def check_tokenizer_files(folder: Path, pipeline: str) -> None:
    """Complain about a tokenizer's folder without a vocabulary.

    Raises:
        ValueError: it has neither `tokenizer.json` nor `vocab.json` with `merges.txt`.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARY):
        raise ValueError(
            f"the pipeline {pipeline} lacks the vocabulary of its part `{folder.name}`: {folder} has neither "
            "tokenizer.json nor vocab.json with merges.txt"
        )


def check_tokenizer(tokenizer, part: str, pipeline: str) -> None:
    """Complain about a loaded tokenizer that knows no word.

    Raises:
        ValueError: its vocabulary holds special tokens only.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the vocabulary of the part `{part}` of the pipeline {pipeline} is empty but for special tokens "
            f"({', '.join(tokenizer.all_special_tokens)}): every prompt would mean the same"
        )


def check_weight_files(folder: Path, pipeline: str) -> None:
    """Complain about a model's folder whose weights are missing, no safetensors, or cut off; none are read.

    Raises:
        ValueError: names the folder or the file.
    """
    name = f"{'model' if folder.name.startswith('text_encoder') else 'diffusion_pytorch_model'}.safetensors"
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        files = [folder / name]
    elif index.is_file():
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / part for part in sorted(set(parts))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no list of a model's files; fetch or save it again") from error
    else:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _WEIGHTS)
        found = f"only {', '.join(others)}" if others else "no weights"
        raise ValueError(
            f"the pipeline {pipeline} lacks the weights of its part `{folder.name}`: {folder} holds {found}; what is "
            f"wanted is {name}, as `save_pretrained` writes it (other formats are not read: they may hold code)"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch or save it again") from error


def check_loaded(model: torch.nn.Module, part: str, pipeline: str) -> None:
    """Complain about a loaded model that its files lack weights of, or whose weights are not all numbers: else a policy
    would seem to have diverged.

    Raises:
        ValueError: names the part and the first such weight.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta:  # diffusers leaves them there
            raise ValueError(f"the files of the pipeline {pipeline} lack weights of its part `{part}`: {name}")
        if not weight.isfinite().all():
            raise ValueError(f"weights of the part `{part}` of the pipeline {pipeline} are not finite: {name}")
