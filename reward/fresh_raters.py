"""The ceiling of every metric: what people other than those who made the labels say of the same pictures.

`python -m reward.evaluate --raters DIR` compares the records in DIR with the labels just as it compares the predictor.
DIR has the form that `python -m reward.richhf` writes: split -> rows with `uid`, the four scores, `keyword_labels` and
the two maps, of which only those with the uids asked for are read. The more raters a row is the mean of, the nearer it
comes to the most that can be known of the labels. An optional column `keyword_shares` holds, for each word, the share
of raters who marked it; the share above which a word counts is then chosen for the best F1 on the dev split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from reward.checks import check_labels, read_row
from reward.data import load_data, to_tensor
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import word_metrics

SHARES = "keyword_shares"
MAJORITY = 0.5


@dataclass(frozen=True)
class FreshRaters:
    """Records of other raters on the pictures of a split, in the split's order.

    Attributes:
        records: columns as above.
        threshold: a word counts as misaligned if a larger share of the raters marked it.
    """

    records: Dataset
    threshold: float

    def scores(self) -> np.ndarray:
        """(N, 4) in [0, 1], in the order of `SCORES`."""
        return np.stack([np.asarray(self.records[name], dtype=np.float64) for name in SCORES], axis=1)

    def maps(self, index: int) -> torch.Tensor:
        """(2, h, w) float32 in [0, 1] of one picture, in the order of `HEATMAPS`."""
        row = read_row(self.records, index)
        return torch.cat([to_tensor(row[f"{name}_map"], "L").float() / 255 for name in HEATMAPS])

    def words(self) -> list[list[int]]:
        """For each picture its words, 1 = misaligned."""
        return [[int(share > self.threshold) for share in shares] for shares in _shares(self.records)]


def load_fresh_raters(folder: str | Path, data: DatasetDict, split: str) -> FreshRaters:
    """The records in `folder` for the pictures of `data[split]`.

    Raises:
        ValueError: no such folder, split or column; a picture without a record; a record whose words are not as many
            as its prompt's tokens.
    """
    raters = load_data(folder)
    if split not in raters:
        raise ValueError(f"the raters' folder {folder} has no split {split!r}; it has {', '.join(raters)}")
    records = _matched(raters[split], data[split], folder)
    threshold = MAJORITY
    if SHARES in records.column_names and "dev" in raters and "dev" in data:
        threshold = best_share(_shares(_matched(raters["dev"], data["dev"], folder)), data["dev"]["keyword_labels"])
    return FreshRaters(records, threshold)


def best_share(shares: Sequence[Sequence[float]], labels: Sequence[Sequence[int]]) -> float:
    """The share of raters, of those that occur, above which a word must be marked for the best F1 against `labels`.

    The nearest to a half where several are equally good; a half where no word is misaligned.
    """
    candidates = sorted({0.0, MAJORITY, *(float(share) for of_prompt in shares for share in of_prompt)})
    found = [
        word_metrics([[share > candidate for share in of_prompt] for of_prompt in shares], labels)["f1"]
        for candidate in candidates
    ]
    best = [candidate for candidate, f1 in zip(candidates, found, strict=True) if f1 == max(found)]
    return min(best, key=lambda candidate: abs(candidate - MAJORITY))


def _matched(records: Dataset, pictures: Dataset, folder: str | Path) -> Dataset:
    """The rows of `records` with the uids of `pictures`, in their order."""
    wanted = {"uid", "keyword_labels", *SCORES, *(f"{name}_map" for name in HEATMAPS)}
    if missing := sorted(wanted - set(records.column_names)):
        raise ValueError(
            f"the raters' folder {folder} lacks the columns {missing}; `python -m reward.richhf` writes them"
        )
    places = {uid: place for place, uid in enumerate(records["uid"])}
    uids = pictures["uid"]
    if absent := [uid for uid in uids if uid not in places]:
        raise ValueError(
            f"{len(absent)} of {len(uids)} pictures have no record in the raters' folder {folder} (such as "
            f"{', '.join(absent[:3])}); it must hold the same pictures, or leave --raters out"
        )
    kept = [name for name in records.column_names if name in wanted or name == SHARES]  # pictures need no decoding
    matched = records.select_columns(kept).select([places[uid] for uid in uids])
    check_labels(matched, f"the raters' folder {folder}")
    for uid, said, labels in zip(uids, _shares(matched), pictures["keyword_labels"], strict=True):
        if len(said) != len(labels):
            raise ValueError(f"the raters' record of {uid} in {folder} has {len(said)} words, its prompt {len(labels)}")
    return matched


def _shares(records: Dataset) -> list[list[float]]:
    return list(records[SHARES if SHARES in records.column_names else "keyword_labels"])
