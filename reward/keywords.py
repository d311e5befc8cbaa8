"""Prompts, their tokens, and which of them are misaligned; pure.

Everywhere in this project a label is **1 = misaligned** (the word is misrepresented or missing in the image). The file
format of RichHF-18K has it the other way round, 0 = misaligned; only `parse_labels` and `format_labels` know that.
"""

from collections.abc import Sequence

from reward.feedback import tokenize

__all__ = ["SUFFIX", "format_labels", "join", "mark", "parse_labels", "tokenize", "unmark"]

SUFFIX = "_0"
"""What RAHF's text decoder appends to a misaligned word (arXiv 2312.10240, section 4.1)."""


def join(tokens: Sequence[str]) -> str:
    """The text given to the model, in training and in prediction: the tokens joined by one space."""
    return " ".join(tokens)


def mark(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """Tokens and labels (1 = misaligned) -> text in which misaligned tokens end in `_0`.

    >>> mark(["a", "red", "cat"], [0, 1, 0])
    'a red_0 cat'
    """
    if len(tokens) != len(labels):
        raise ValueError(f"{len(tokens)} tokens have {len(labels)} labels; there must be one label a token")
    return join([token + SUFFIX if label else token for token, label in zip(tokens, labels, strict=True)])


def unmark(text: str) -> tuple[list[str], list[int]]:
    """The inverse of `mark`: text -> tokens and labels (1 = misaligned).

    A token whose own spelling ends in `_0` cannot be told from a marked one; it is read as marked.
    """
    pieces = [piece for piece in text.split(" ") if piece]
    labels = [int(piece.endswith(SUFFIX) and piece != SUFFIX) for piece in pieces]
    tokens = [piece.removesuffix(SUFFIX) if label else piece for piece, label in zip(pieces, labels, strict=True)]
    return tokens, labels


def parse_labels(field: str) -> list[int]:
    """RichHF-18K's `prompt_misalignment_label`, space-separated with **0 = misaligned**, -> labels, 1 = misaligned.

    Raises:
        ValueError: something other than 0 and 1 is found.

    >>> parse_labels("1 0 1")
    [0, 1, 0]
    """
    pieces = field.split()
    if wrong := set(pieces) - {"0", "1"}:
        raise ValueError(f"keyword labels must be 0 or 1, not {sorted(wrong)}")
    return [1 - int(piece) for piece in pieces]


def format_labels(labels: Sequence[int]) -> str:
    """Labels (1 = misaligned) -> RichHF-18K's field (0 = misaligned); the inverse of `parse_labels`."""
    return " ".join(str(1 - int(label)) for label in labels)
