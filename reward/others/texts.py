"""Prompts for the models of others: tokenised as the model's own tokenizer does, cut with a warning."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from reward.others.files import BROKEN, first_line

_QUOTED = 60


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except BROKEN as error:
        raise ValueError(f"{source} has no tokenizer that can be loaded: {first_line(error)}") from error


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, device: torch.device, full: bool = False
) -> BatchEncoding:
    """B texts -> input_ids, attention_mask, (B, L) int64 on `device`, with a warning where a text is cut.

    Args:
        length: the most tokens of a text.
        full: whether L is `length` always, or as many as the longest text needs.
    """
    encoded = tokenizer(
        list(texts), padding="max_length" if full else True, truncation=True, max_length=length, return_tensors="pt"
    )
    if cut := [text for text, row in zip(texts, encoded.encodings, strict=True) if row.overflowing]:
        warnings.warn(
            f"{len(cut)} prompts are longer than the {length} tokens that the reward's model reads, and are cut: "
            f"{cut[0][:_QUOTED]!r}...",
            stacklevel=2,
        )
    return encoded.to(device)
