"""The judge's verdicts on pictures, kept in a file: a megabyte in place of minutes of judging (`tinyworld.build`).

Kept beside the rated pictures of the repository; a test compares some of them with the judge.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tinyworld.judge import Verdict
from tinyworld.scenes import SIZE

_MASKS = ("implausible", "misaligned")
_OTHERS = ("words", "plausibility", "alignment", "aesthetics", "overall", "satisfied", "flaws")


def write_verdicts(
    file: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], verdicts: Sequence[Verdict]
) -> None:
    """Write what the judge said of pictures, (64, 64, 3) uint8, but for the single things it found; the file appears
    when it is whole."""
    table = {"of": [_name(*pair) for pair in zip(pictures, captions, strict=True)]}
    for mask in _MASKS:
        table[mask] = [np.packbits(getattr(verdict, mask)).tobytes() for verdict in verdicts]
    for name in _OTHERS:
        values = [getattr(verdict, name) for verdict in verdicts]
        table[name] = [sorted(one) for one in values] if name in ("words", "flaws") else values
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    pyarrow.parquet.write_table(pa.table(table), beside, compression="zstd")
    beside.replace(file)


def read_verdicts(file: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Iterator[Verdict]:
    """The verdicts on the first of these pictures, in order: so many as the file holds; their `things` are left out,
    and empty.

    Raises:
        ValueError: the file is of other pictures or captions.
    """
    rows = pyarrow.parquet.read_table(file).to_pylist()
    first = islice(zip(pictures, captions, strict=True), len(rows))
    if [row["of"] for row in rows] != [_name(*pair) for pair in first]:
        raise ValueError(f"{file} is of other pictures; make it again: python -m tinyworld.build --stages verdicts")
    for row in rows:
        masks = [np.unpackbits(np.frombuffer(row[name], np.uint8)).astype(bool).reshape(SIZE, SIZE) for name in _MASKS]
        others = {name: row[name] for name in _OTHERS}
        others |= {"words": tuple(row["words"]), "flaws": frozenset(row["flaws"])}
        yield Verdict(*masks, **others, things=())


def _name(picture: np.ndarray, caption: str) -> str:
    return hashlib.sha256(picture.tobytes() + caption.encode()).hexdigest()[:16]
