"""Pictures with prompts to choose from: a folder with a table of prompts, or a `datasets` data set.

Nothing is decoded here; a picture is read when it is asked for.
"""

import hashlib
import io
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

import datasets
import torch

from reward.data import to_tensor
from reward.pictures import decode
from reward.stored_rows import PICTURE_SUFFIXES, table_rows

logger = logging.getLogger(__name__)

TABLES = ("metadata.jsonl", "metadata.csv")
PROMPT_COLUMNS = ("text", "prompt", "caption")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_NAMED = 5

Found = TypeVar("Found")


@dataclass(frozen=True)
class Entry:
    """One picture of a pool.

    Attributes:
        name: of the picture's file; unique in its pool, with `/` between folders.
        prompt: never blank.
        size: bytes of the picture's file, or of all that the data set's are in.
        stamp: another one if the picture has changed.
        columns: what else the pool says of it, by column.
    """

    name: str
    prompt: str
    size: int
    stamp: str
    columns: Mapping[str, Any]


class Pool(Protocol):
    """Pictures with prompts, in a fixed order."""

    place: Path
    entries: Sequence[Entry]

    def read(self, index: int) -> bytes:
        """The encoded picture of `entries[index]`.

        Raises:
            ValueError: it is not there; the message names it.
        """
        ...

    def head(self, index: int) -> BinaryIO:
        """The same as a file to read from its beginning, for who needs no more than that; to be closed.

        Raises:
            ValueError: it is not there; the message names it.
        """
        ...


@dataclass(frozen=True)
class FolderPool:
    """Picture files in a folder, and `metadata.jsonl` or `metadata.csv` with their names and prompts there: what
    `datasets` calls an image folder."""

    place: Path
    entries: Sequence[Entry]

    def read(self, index: int) -> bytes:
        with self.head(index) as file:
            return file.read()

    def head(self, index: int) -> BinaryIO:
        file = self.place / self.entries[index].name
        try:
            return file.open("rb")
        except OSError as error:
            raise ValueError(f"the picture {file} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class RowPool:
    """The rows of a data set; pictures are named by their rows."""

    place: Path
    entries: Sequence[Entry]
    rows: datasets.Dataset
    image_column: str

    def read(self, index: int) -> bytes:
        cell = self.rows.select_columns([self.image_column])[index][self.image_column]
        if cell and cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path((cell or {})["path"]).read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"row {index} of {self.place} holds no picture: {cell}") from error

    def head(self, index: int) -> BinaryIO:
        return io.BytesIO(self.read(index))


def open_pool(place: str | Path, prompt_column: str | None = None, split: str = "train") -> Pool:
    """The pictures of `place`, in the order of its table or rows.

    Args:
        place: a folder of pictures with a table, what `Dataset.save_to_disk` wrote, or a folder of parquet files.
        prompt_column: where the prompts are; None: the first of `PROMPT_COLUMNS` that there is.
        split: which one of a saved data set or of parquet files; see `load_rows`.

    Raises:
        ValueError: it is none of these, lacks a column, has no such split, or pictures lack prompts (five are named).
    """
    place = Path(place)
    if not place.is_dir():
        raise ValueError(f"there is no folder of pictures {place}")
    if tables := [place / name for name in TABLES if (place / name).is_file()]:
        if split != "train":
            logger.warning(
                "split %s is ignored: %s is a folder of pictures with a table, all of one split", split, place
            )
        return _open_folder(place, tables[0], prompt_column)
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file() or list(place.rglob("*.parquet")):
        return _open_rows(place, prompt_column, split)
    if pictures := _picture_files(place):
        raise ValueError(
            f"the {len(pictures)} pictures of {place} have no prompts: write a metadata.jsonl there, a line a picture: "
            f'{{"file_name": "{pictures[0]}", "text": "its prompt"}}'
        )
    raise ValueError(
        f"{place} holds no pictures: neither a metadata.jsonl or metadata.csv with pictures, nor a saved data set, nor "
        "parquet files"
    )


def fingerprint(pool: Pool) -> str:
    """SHA-256 of a pool's names, prompts and sizes: the same wherever the pool was copied to, another one where
    pictures were added, taken away, or exchanged for others that are not of the same size. No picture is read."""
    told = json.dumps([[one.name, one.prompt, one.size] for one in pool.entries])
    return hashlib.sha256(told.encode()).hexdigest()


def read_pictures(pool: Pool, places: Sequence[int]) -> list[torch.Tensor]:
    """The pictures at `places` of the pool, each (3, H, W) uint8.

    Raises:
        ValueError: some cannot be read; five are named, with what is wrong with the first.
    """
    return read_each(pool, places, lambda place: to_tensor(decode(pool.read(place))))


def read_each(pool: Pool, places: Sequence[int], look: Callable[[int], Found]) -> list[Found]:
    """What `look`, which is given a place, finds in the pictures at `places`.

    Raises:
        ValueError: it raises one for some; five are named, with what is wrong with the first.
    """
    found, wrong = [], {}
    for place in places:
        try:
            found.append(look(place))
        except ValueError as error:
            wrong[pool.entries[place].name] = error
    if wrong:
        names = list(wrong)
        more = f" ({len(wrong)} of {len(places)} cannot: {', '.join(names[:_NAMED])})" if len(wrong) > 1 else ""
        raise ValueError(
            f"the picture {names[0]} of {pool.place} cannot be read: {wrong[names[0]]}{more}; mend it, or take it away "
            "with its line in the table; what has been done is kept"
        )
    return found


def suffix_of(data: bytes, name: str) -> str:
    """What a picture's file is to be called at its end: as it is, or as its contents are."""
    return Path(name).suffix or f".{decode(data).format.lower()}"


def _open_folder(place: Path, table: Path, prompt_column: str | None) -> FolderPool:
    rows = list(table_rows(table))
    found = list(rows[0]) if rows else []
    column = _prompt_column(found, prompt_column, table)
    if "file_name" not in found:
        raise ValueError(f"{table} lacks the column file_name; it has {', '.join(found) or 'none'}")
    names = [PurePosixPath(str(row.get("file_name"))).as_posix() for row in rows]  # ./a.png is a.png
    _refuse([name for name, count in Counter(names).items() if count > 1], f"{table} names pictures twice")
    _refuse([name for name in names if not _inside(place, name)], f"{table} names pictures outside its folder")
    _refuse([name for name in names if not (place / name).is_file()], f"{table} names pictures that are not there")
    _refuse_without_prompts(names, [row.get(column) for row in rows], table, column)
    listed = set(names)
    _refuse(
        [name for name in _picture_files(place) if name not in listed],
        f"pictures of {place} have no prompts; give them a line in {table.name}, or take them away",
    )
    entries = []
    for name, row in zip(names, rows, strict=True):
        stat = (place / name).stat()
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
        entries.append(Entry(name, row[column], stat.st_size, stamp, _without(row, "file_name", column)))
    return FolderPool(place, entries)


def _open_rows(place: Path, prompt_column: str | None, split: str) -> RowPool:
    rows, files = load_rows(place, split)
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(f"{place} has no column of pictures; its columns are {', '.join(rows.column_names)}")
    column = _prompt_column(rows.column_names, prompt_column, place)
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    table = rows.remove_columns(images)
    names = [f"{index:08d}" for index in range(len(rows))]
    _refuse_without_prompts([f"row {index}" for index in range(len(rows))], table[column][:], place, column)
    stats = [file.stat() for file in files]
    size, stamp = sum(one.st_size for one in stats), ",".join(f"{one.st_size}:{one.st_mtime_ns}" for one in stats)
    entries = [
        Entry(name, row[column], size, stamp, _without(row, column)) for name, row in zip(names, table, strict=True)
    ]
    return RowPool(place, entries, rows, images[0])


def load_rows(place: Path, split: str) -> tuple[datasets.Dataset, list[Path]]:
    """The rows of one split of a folder of parquet files, or of what was saved to disk, and the files that hold them.

    Parquet files are named for their splits as on the hub: `train-00000-of-00002.parquet`, `test.parquet`, or in a
    folder `test`. Those whose names say nothing are `train`. What `Dataset.save_to_disk` wrote has one split, whatever
    it is called.

    Raises:
        ValueError: there is no such split; those that there are are listed.
    """
    if found := sorted(place.rglob("*.parquet")):
        splits = defaultdict(list)
        for file in found:
            splits[_split_of(file)].append(file)
        _check_split(place, split, splits)
        files = splits[split]
        return datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train"), files
    loaded = datasets.load_from_disk(str(place))
    if isinstance(loaded, datasets.Dataset):
        return loaded, sorted(place.rglob("*.arrow"))
    _check_split(place, split, loaded)
    return loaded[split], sorted((place / split).rglob("*.arrow"))


def _split_of(file: Path) -> str:
    """`validation_unique` of `validation_unique-00000-of-00001-0a1b.parquet`."""
    if shard := _SHARD.match(file.name):
        return shard[1]
    return next((name for name in (file.stem, file.parent.name) if name in _SPLITS), "train")


def _check_split(place: Path, split: str, found: Iterable[str]) -> None:
    if split not in found:
        raise ValueError(f"{place} has no split {split!r}; it has {', '.join(found)}")


def _prompt_column(found: Sequence[str], asked: str | None, where: Path) -> str:
    wanted = PROMPT_COLUMNS if asked is None else (asked,)
    column = next((name for name in wanted if name in found), None)
    if column is None:
        raise ValueError(
            f"the pictures of {where} have no prompts: it has no column {' or '.join(wanted)}, only "
            f"{', '.join(found) or 'nothing'}; name the column by --prompt_column"
        )
    return column


def _refuse_without_prompts(names: Sequence[str], prompts: Sequence[object], where: Path, column: str) -> None:
    _refuse(
        [
            name
            for name, prompt in zip(names, prompts, strict=True)
            if not isinstance(prompt, str) or not prompt.strip()
        ],
        f"{where} says no prompts (column {column}) of some pictures",
    )
    _refuse(
        [name for name, prompt in zip(names, prompts, strict=True) if _is_cut(prompt)],
        f"{where} has prompts (column {column}) with half a character, as where an emoji was cut",
    )


def _is_cut(prompt: str) -> bool:
    """Whether it is no text that could be stored: JSON may hold the first half of a pair of surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        more = ", ..." if len(names) > _NAMED else ""
        raise ValueError(f"{what}: {len(names)} of them, {', '.join(names[:_NAMED])}{more}")


def _picture_files(place: Path) -> list[str]:
    files = (path for path in place.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(path.relative_to(place).as_posix() for path in files)


def _inside(place: Path, name: str) -> bool:
    return (place / name).resolve().is_relative_to(place.resolve())


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
