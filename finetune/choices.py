"""What people chose: pairs of pictures of one prompt, and which of them is better, as Pick-a-Pic keeps them.

A row has `jpg_0`, `jpg_1` (bytes, or what `datasets` keeps of pictures), `caption` and `label_0`: 1 where the first was
chosen, 0 where the second was, 0.5 for a tie. Ties say nothing of who is right, and are left out; so are pairs that
nobody judged, where a column `has_label` says so.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from finetune.pool import load_rows
from reward.data import to_tensor
from reward.pictures import decode

logger = logging.getLogger(__name__)

COLUMNS = ("jpg_0", "jpg_1", "caption", "label_0")
HAS_LABEL = "has_label"


@dataclass(frozen=True)
class Choices:
    """C pairs.

    Attributes:
        captions: C.
        first: for each, whether the first picture was chosen.
        places: their rows.
    """

    place: Path
    captions: Sequence[str]
    first: Sequence[bool]
    places: Sequence[int]
    rows: datasets.Dataset

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two pictures of a pair, (3, H, W) uint8 each.

        Raises:
            ValueError: one of them cannot be read; the row is named.
        """
        row = self.rows[self.places[number]]
        try:
            one, other = (to_tensor(decode(_bytes(row[name]))) for name in ("jpg_0", "jpg_1"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {self.places[number]} of {self.place} holds no two pictures: {error}") from error
        return one, other


def open_choices(place: str | Path, split: str = "train", most: int | None = None) -> Choices:
    """The pairs of `place` with a choice, in the order of its rows, at most `most`; no picture is decoded.

    Args:
        place: a folder of parquet files, or what `Dataset.save_to_disk` wrote.
        split: which one; see `finetune.pool.load_rows`.

    Raises:
        ValueError: it is neither, has no such split, lacks a column, holds a label that is none, or no pair with a
            choice.
    """
    place = Path(place)
    saved = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
    if not saved and not list(place.rglob("*.parquet")):
        raise ValueError(f"choices: {place} holds neither parquet files nor a saved data set")
    rows, _ = load_rows(place, split)
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise ValueError(
            f"choices: {place} lacks the columns {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
            f"Pick-a-Pic has {', '.join(COLUMNS)}"
        )
    for name in ("jpg_0", "jpg_1"):
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    table = rows.select_columns([name for name in ("caption", "label_0", HAS_LABEL) if name in rows.column_names])
    labels, labelled = table["label_0"][:], range(len(rows))
    if HAS_LABEL in table.column_names:
        labelled = [row for row, judged in enumerate(table[HAS_LABEL][:]) if judged]
        if left_out := len(rows) - len(labelled):
            logger.warning("%d of %d pairs of %s are left out: nobody judged them", left_out, len(rows), place)
    if wrong := [row for row in labelled if labels[row] not in (0, 0.5, 1)]:
        raise ValueError(f"choices: label_0 of row {wrong[0]} of {place} is {labels[wrong[0]]!r}; it is 0, 0.5 or 1")
    chosen = [row for row in labelled if labels[row] != 0.5][:most]
    if not chosen:
        raise ValueError(f"choices: {place} holds no pair of which one picture was chosen")
    captions = table["caption"][:]
    return Choices(place, [captions[row] for row in chosen], [labels[row] == 1 for row in chosen], chosen, rows)


def _bytes(cell: Any) -> bytes:
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()
    return cell
