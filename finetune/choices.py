"""What people chose: pairs of pictures of one prompt, and which of them is better, as Pick-a-Pic keeps them.

A row has `jpg_0`, `jpg_1` (bytes, or what `datasets` keeps of pictures), `caption` and `label_0`: 1 where the first was
chosen, 0 where the second was, 0.5 for a tie. Ties say nothing of who is right, and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from reward.data import to_tensor
from reward.pictures import decode

COLUMNS = ("jpg_0", "jpg_1", "caption", "label_0")


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
        split: which one, where a saved data set has several.

    Raises:
        ValueError: it is neither, lacks a column, holds a label that is none, or no pair with a choice.
    """
    place = Path(place)
    if list(place.rglob("*.parquet")):
        files = sorted(map(str, place.rglob("*.parquet")))
        rows = datasets.load_dataset("parquet", data_files=files, split="train")
    elif (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        rows = datasets.load_from_disk(str(place))
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise ValueError(f"{place} has no split {split!r}; it has {', '.join(rows)}")
            rows = rows[split]
    else:
        raise ValueError(f"choices: {place} holds neither parquet files nor a saved data set")
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise ValueError(
            f"choices: {place} lacks the columns {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
            f"Pick-a-Pic has {', '.join(COLUMNS)}"
        )
    for name in ("jpg_0", "jpg_1"):
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    table = rows.select_columns(["caption", "label_0"])
    labels = table["label_0"][:]
    if wrong := [row for row, label in enumerate(labels) if label not in (0, 0.5, 1)]:
        raise ValueError(f"choices: label_0 of row {wrong[0]} of {place} is {labels[wrong[0]]!r}; it is 0, 0.5 or 1")
    chosen = [row for row, label in enumerate(labels) if label != 0.5][:most]
    if not chosen:
        raise ValueError(f"choices: {place} holds no pair of which one picture was chosen")
    captions = table["caption"][:]
    return Choices(place, [captions[row] for row in chosen], [labels[row] == 1 for row in chosen], chosen, rows)


def _bytes(cell: Any) -> bytes:
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()
    return cell
