"""Rich feedback of a pool's pictures, predicted once and kept as parquet beside them.

What is kept is found again by a picture's name, prompt and stamp, wherever in its pool it stands now: a picture that is
taken away or added costs no prediction of another. So pools, and splits of one, may share a folder.

A pool is looked at in parts of `PART` consecutive pictures. What of a part is not known yet becomes one file, written
when it is whole, so that a run that was interrupted loses no more than a part, and processes share parts without
talking to each other. A file is called after the pictures it holds, and none replaces one of others. The folder's name
holds the predictor's fingerprint: another predictor's feedback is not mistaken for this one's.

Shapes: N pictures of the pool, D features of the predictor's vision encoder, S = `MAP_SIDE`.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from finetune.fingerprints import fingerprint
from finetune.pool import Entry, Pool, read_pictures
from reward.data import resize_maps
from reward.feedback import HEATMAPS, SCORES
from reward.predict import RichFeedbackPredictor, check_finite
from reward.whole_files import write_whole

logger = logging.getLogger(__name__)

PART = 256
AT_ONCE = 32
"""Pictures of a part that are in memory together, or a batch if that is more: 256 of a camera's would not fit."""
MAP_SIDE = 32
_FACTS = b"rich_feedback"
_KEY = ("name", "prompt", "stamp")


@dataclass(frozen=True)
class Predictions:
    """What a predictor says of N pictures.

    Attributes:
        names, prompts: of the pictures, in the pool's order.
        values: name of `SCORES` or `HEATMAPS` (the map's mean), or `misaligned_words` (the mean over the prompt's
            words; 0 for none) -> (N,) float32 in [0, 1].
        tokens: the words of each prompt.
        misaligned: for each picture (T,) float32, the words' probabilities of being misaligned.
        maps: name of `HEATMAPS` -> (N, S, S) uint8, 255 for 1.
        features: (N, D) float16, as `RichFeedbackPredictor.features`.
        word_threshold: above it the predictor takes a word for misaligned.
    """

    names: Sequence[str]
    prompts: Sequence[str]
    values: Mapping[str, np.ndarray]
    tokens: Sequence[Sequence[str]]
    misaligned: Sequence[np.ndarray]
    maps: Mapping[str, np.ndarray]
    features: np.ndarray
    word_threshold: float

    def __len__(self) -> int:
        return len(self.names)


class Store:
    """The parts of one pool's feedback by one predictor.

    Args:
        pool: the pictures.
        model: folder of the predictor.
        folder: where feedback is kept; see `feedback_place`.
    """

    def __init__(self, pool: Pool, model: str | Path, folder: str | Path | None = None):
        self.pool = pool
        self.folder = feedback_place(pool.place, folder) / fingerprint(model)
        self._damaged: set[Path] = set()

    def missing(self, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """What of each part is not known yet, as places in the pool; of every `world_size` parts the one of `rank`.

        Parts go by the pool alone, not by what is known: what another process has written since does not change who
        does what. With parts of 4 and the pictures 1, 2 and 9 of 10 unknown: [1, 2] and [9], of two processes the first
        one's both.
        """
        known, entries = self._known(), self.pool.entries
        parts = (
            [place for place in range(first, min(first + PART, len(entries))) if _key(entries[place]) not in known]
            for first in range(rank * PART, len(entries), world_size * PART)
        )
        return [part for part in parts if part]

    def predict(
        self,
        parts: Sequence[Sequence[int]],
        predictor: RichFeedbackPredictor,
        batch_size: int,
        on_picture: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Predict and write `parts`.

        Args:
            parts: places in the pool, as `missing` gives them.
            batch_size: pictures judged at once, where they are of one size.
            on_picture: called with the number of pictures that are done.

        Raises:
            ValueError: pictures that cannot be read, five of those read together are named, or feedback of one that is
                NaN; parts written before are kept.
        """
        facts = {"word_threshold": predictor.word_threshold}
        for part in parts:
            rows = []
            for some in _in_runs(part, max(AT_ONCE, batch_size)):
                entries = [self.pool.entries[place] for place in some]
                rows += _predict(predictor, read_pictures(self.pool, some), entries, batch_size, on_picture)
            table = pa.Table.from_pylist(rows, schema=_schema(len(rows[0]["features"])))
            table = table.replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
            sink = pa.BufferOutputStream()
            pyarrow.parquet.write_table(table, sink)
            write_whole(self._file(part), sink.getvalue().to_pybytes())

    def load(self) -> Predictions:
        """The feedback of all pictures, which must be there."""
        known = self._known()
        found = [known[_key(entry)] for entry in self.pool.entries]
        rows_of = defaultdict(list)
        for file, row in found:
            rows_of[file].append(row)
        tables, place_of = [], {}
        for file, rows in rows_of.items():
            place_of |= {(file, row): len(place_of) + index for index, row in enumerate(rows)}
            tables.append(pyarrow.parquet.read_table(file).take(rows))
        facts = json.loads(tables[0].schema.metadata[_FACTS])
        table = pa.concat_tables(tables).take([place_of[one] for one in found])

        def column(name: str) -> np.ndarray:
            return table[name].combine_chunks().to_numpy(zero_copy_only=False)

        def block(name: str, dtype: type) -> np.ndarray:
            return np.stack([np.frombuffer(row, dtype=dtype) for row in table[name].to_pylist()])

        return Predictions(
            names=table["name"].to_pylist(),
            prompts=table["prompt"].to_pylist(),
            values={name: column(name) for name in (*SCORES, *HEATMAPS, "misaligned_words")},
            tokens=table["tokens"].to_pylist(),
            misaligned=[np.array(row, dtype=np.float32) for row in table["misaligned"].to_pylist()],
            maps={name: block(f"{name}_map", np.uint8).reshape(-1, MAP_SIDE, MAP_SIDE) for name in HEATMAPS},
            features=block("features", np.float16),
            word_threshold=facts["word_threshold"],
        )

    def _file(self, part: Sequence[int]) -> Path:
        keys = [_key(self.pool.entries[place]) for place in part]
        return self.folder / f"part-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]}.parquet"

    def _known(self) -> dict[tuple[str, ...], tuple[Path, int]]:
        """Key of a picture -> the file with its feedback, and the row there."""
        known = {}
        for file in sorted(self.folder.glob("part-*.parquet")):
            try:
                table = pyarrow.parquet.read_table(file, columns=list(_KEY))
            except (pa.ArrowInvalid, OSError):
                if file not in self._damaged:
                    logger.warning("%s is damaged; what it held is predicted again", file)
                self._damaged.add(file)
                continue
            keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
            known |= {key: (file, row) for row, key in enumerate(keys)}
        return known


def _key(entry: Entry) -> tuple[str, ...]:
    return entry.name, entry.prompt, entry.stamp


def feedback_place(pictures: str | Path, folder: str | Path | None = None) -> Path:
    """Where the feedback of pictures is kept: in `folder`; None: beside them, in a folder of their name with
    `_feedback` behind it."""
    if folder:
        return Path(folder)
    place = Path(os.path.abspath(pictures))  # `.` has no name of its own
    return place.with_name(place.name + "_feedback")


def _in_runs(places: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    return (places[first : first + most] for first in range(0, len(places), most))


def _predict(
    predictor: RichFeedbackPredictor,
    images: Sequence[torch.Tensor],
    entries: Sequence[Entry],
    batch_size: int,
    on_picture: Callable[[int], None],
) -> list[dict]:
    """A row of the table for each picture; those of one size are judged together."""
    by_size = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.shape].append(index)
    rows: dict[int, dict] = {}
    for places in by_size.values():
        for first in range(0, len(places), batch_size):
            chunk = places[first : first + batch_size]
            pictures = torch.stack([images[index] for index in chunk]).float() / 255
            feedback, features = predictor.with_features(
                pictures, [entries[index].prompt for index in chunk], batch_size, predictor.model.config.map_size
            )
            check_finite(feedback, [entries[index].name for index in chunk])
            small = {
                name: resize_maps(maps[:, None], (MAP_SIDE,) * 2)[:, 0] for name, maps in feedback.heatmaps.items()
            }
            for row, index in enumerate(chunk):
                words = feedback.misaligned[row].cpu()
                rows[index] = {
                    "name": entries[index].name,
                    "prompt": entries[index].prompt,
                    "stamp": entries[index].stamp,
                    **{name: float(values[row]) for name, values in feedback.scores.items()},
                    **{name: float(maps[row].mean()) for name, maps in feedback.heatmaps.items()},
                    "misaligned_words": float(words.sum()) / max(len(words), 1),
                    "tokens": list(feedback.tokens[row]),
                    "misaligned": words.tolist(),
                    **{f"{name}_map": _as_bytes(maps[row]) for name, maps in small.items()},
                    "features": features[row].cpu().numpy().astype(np.float16).tobytes(),
                }
            on_picture(len(chunk))
    return [rows[index] for index in range(len(images))]


def _as_bytes(heatmap: torch.Tensor) -> bytes:
    return (heatmap.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()


def _schema(feature_bytes: int) -> pa.Schema:
    numbers = [(name, pa.float32()) for name in (*SCORES, *HEATMAPS, "misaligned_words")]
    return pa.schema(
        [
            *(("name", pa.string()), ("prompt", pa.string()), ("stamp", pa.string())),
            *numbers,
            *(("tokens", pa.list_(pa.string())), ("misaligned", pa.list_(pa.float32()))),
            *((f"{name}_map", pa.binary(MAP_SIDE**2)) for name in HEATMAPS),
            ("features", pa.binary(feature_bytes)),
        ]
    )
