"""What the files of a pipeline folder's parts must be, looked into before anything is loaded from them.

diffusers and transformers say too little: a tokenizer without its vocabulary loads as an empty one, which encodes every
prompt alike; weights that are cut off end in an error that does not name their file.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".ckpt", ".pt", ".pth"))
        found = f"only {', '.join(others)}, which is not read as it may hold code" if others else "no weights"
        raise ValueError(
            f"the pipeline {pipeline} lacks the weights of its part `{folder.name}`: {folder} holds {found}; what is "
            "wanted is a file .safetensors, as `save_pretrained` writes it"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch or save it again") from error
