"""Rows of tables as they lie on disk, streamed: parquet, arrow as `datasets` keeps it, CSV and JSONL.

At no time is more than a few rows in memory. Arrow files are mapped, as a batch of theirs may be the whole file; mapped
pages count as the process's memory (`ru_maxrss`), although the kernel can drop them, so they are given back every few
rows. Compressed arrow files are unpacked batch by batch, the needed columns only.
"""

import csv
import json
import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BATCH = 16  # rows: a few megabytes of pictures


def data_files(place: Path) -> list[Path]:
    """Parquet files; or the arrow files of a data set that was saved to disk; or those of `datasets`' cache.

    Raises:
        ValueError: a saved data set's `state.json` is no JSON.
    """
    if place.is_file():
        return [place] if place.suffix == ".parquet" else []
    if files := sorted(place.rglob("*.parquet")):
        return files
    if states := sorted(place.rglob("state.json")):
        names = [(state, entry["filename"]) for state in states for entry in _json_file(state).get("_data_files", [])]
        return [state.with_name(Path(name).name) for state, name in names]
    return sorted(path for path in place.rglob("*.arrow") if not path.name.startswith(("cache-", "tmp")))


def _json_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def schema_of(file: Path) -> pa.Schema:
    """The columns of a parquet or arrow file; no row is read.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_schema(file)
        with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as stream:
            return stream.schema
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error


def rows_of(file: Path, keys: Sequence[str], names: Sequence[str], wanted: Collection[str]) -> Iterator[dict]:
    """The rows of a parquet or arrow file in which one of the columns `keys` is a wanted uid, as dicts of `names`.

    Raises:
        ValueError: the file cannot be read, or not on.
    """
    names = list(dict.fromkeys(names))
    try:
        for batch in _batches(file, keys, names, wanted):
            columns = [batch.column(name).to_pylist() for name in keys]
            rows = [row for row, uids in enumerate(zip(*columns, strict=True)) if _any_wanted(uids, wanted)]
            for row in rows:  # one by one: a row is a copy out of the batch
                yield batch.slice(row, 1).to_pylist()[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error


def _batches(
    file: Path, keys: Sequence[str], names: Sequence[str], wanted: Collection[str]
) -> Iterator[pa.RecordBatch]:
    """The rows' columns `names`, `_BATCH` rows at most at a time; each is let go before the next is asked for."""
    if file.suffix != ".parquet":
        yield from _mapped_batches(file, names)
        return
    # Without a buffer a whole column is read, and ahead of its use a whole row group, which may be the file.
    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        for group in range(table.num_row_groups):
            uids = table.read_row_group(group, columns=list(keys)).to_pydict()
            if any(_any_wanted(column, wanted) for column in uids.values()):  # else its pictures are not even read
                yield from table.iter_batches(batch_size=_BATCH, row_groups=[group], columns=names)


def _mapped_batches(file: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The same of an arrow file, whose batches may have any size: what was looked at is given back to the kernel."""
    found = schema_of(file).names
    options = pa.ipc.IpcReadOptions(included_fields=[found.index(name) for name in names])
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with pa.ipc.open_stream(pa.py_buffer(mapped), options=options) as stream:
        for batch in stream:
            for begin in range(0, batch.num_rows, _BATCH):
                yield batch.slice(begin, _BATCH).select(names)
                if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, where pages stay until memory is short
                    mapped.madvise(mmap.MADV_DONTNEED)


def _any_wanted(uids: Sequence[object], wanted: Collection[str]) -> bool:
    return any(uid_of(uid) in wanted for uid in uids)


def uid_of(value: object) -> str:
    """A uid as it stands; of a picture file's name, the stem."""
    text = text_of(value)
    return Path(text).stem if text.lower().endswith(PICTURE_SUFFIXES) else text


def text_of(value: object) -> str:
    """A plain value as text; empty where there is none."""
    return "" if value is None else str(value)


def table_rows(table: Path) -> Iterator[dict]:
    """The rows of a CSV or JSONL file, one at a time.

    Raises:
        ValueError: it is no UTF-8, or a line is not sound.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                yield from csv.DictReader(file, strict=True)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{table}, line {number}: each line must be a JSON object")
                    yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{table}, line {number}: not valid JSON ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{table} is not a sound CSV file: {error}") from error
