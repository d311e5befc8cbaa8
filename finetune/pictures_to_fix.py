"""Pictures and their prompts, as `finetune.inpaint` is given them."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from finetune.pool import PROMPT_COLUMNS, TABLES, Pool, open_pool
from reward.data import to_tensor
from reward.pictures import decode
from reward.sources import PAIR_COLUMNS, Columns, Picture, Source, open_source
from reward.stored_rows import data_files, schema_of, table_rows

logger = logging.getLogger(__name__)

_NAMED = 5
_TABLE_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class NamedPictures:
    """Picture files, a prompt for each, as a `reward.sources.Source`; the uid is a file's name, less its suffix."""

    files: Sequence[str]
    prompts: Sequence[str]

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        for file, prompt in zip(self.files, self.prompts, strict=True):
            if (path := Path(file)).stem in wanted:
                yield Picture(path.stem, path.read_bytes() if path.is_file() else None, prompt)


@dataclass(frozen=True)
class PoolPictures:
    """A pool's pictures as a `reward.sources.Source`; the uid is a file's place in its folder, less its suffix, or the
    number of a data set's row."""

    pool: Pool

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        for place, entry in enumerate(self.pool.entries):
            if (uid := PurePosixPath(entry.name).with_suffix("").as_posix()) in wanted:
                yield Picture(uid, self.pool.read(place), entry.prompt)


def open_pictures(
    place: str | Path, prompt_column: str | None = None, table: str | Path | None = None, split: str = "train"
) -> Source:
    """The pictures of a folder with a table of prompts, of Pick-a-Pic's pairs, or of a data set of one picture a row.

    Results go by a picture's uid: of a data set the column `uid`, or the row's number where there is none.

    Args:
        prompt_column: None: see `InpaintArguments.prompt_column`.
        table: of a folder's prompts; None: its metadata.jsonl or metadata.csv, or the only table that there is.
        split: of a data set without uids; all rows of the others are read.

    Raises:
        ValueError: there are no such pictures, or no column of prompts; see `reward.sources.open_source` and
            `finetune.pool.open_pool`.
    """
    place = Path(place)
    if table is None and any((place / name).is_file() for name in TABLES):
        return PoolPictures(open_pool(place, prompt_column, split))
    files = data_files(place) if table is None else []
    columns = schema_of(files[0]).names if files else []
    if files and not set(PAIR_COLUMNS) <= set(columns) and not {"uid", "image"} <= set(columns):
        if place.is_file():
            raise ValueError(
                f"{place} has no columns uid and image (it has {', '.join(columns)}), and the rows of single files are "
                f"not numbered; name the folder that it is in, with the --split that it holds: {place.parent}"
            )
        return PoolPictures(open_pool(place, prompt_column, split))
    if split != "train":
        logger.warning("split=%r is ignored: %s is read as a whole", split, place)
    if not files:
        prompt_column = prompt_column or "prompt"
        _check_table(place, table, prompt_column)
        return open_source(place, Columns(prompt=prompt_column), table)
    if set(PAIR_COLUMNS) <= set(columns):
        if prompt_column is not None:
            logger.warning("prompt_column=%r is ignored: Pick-a-Pic's prompts are in caption", prompt_column)
        return open_source(place)
    asked = ("prompt", *PROMPT_COLUMNS) if prompt_column is None else (prompt_column,)
    found = next((name for name in asked if name in columns), None)
    if found is None:
        raise ValueError(
            f"{place} has no column of prompts {' or '.join(dict.fromkeys(asked))}; it has {', '.join(columns)}; name "
            "it by --prompt_column"
        )
    return open_source(place, Columns(prompt=found))


def _check_table(folder: Path, table: str | Path | None, prompt_column: str) -> None:
    """Complain about a folder's table, if there is one to be read, that lacks a column."""
    tables = [Path(table)] if table else [path for path in folder.glob("*") if path.suffix.lower() in _TABLE_SUFFIXES]
    if len(tables) != 1 or not tables[0].is_file() or tables[0].suffix.lower() not in _TABLE_SUFFIXES:
        return  # which `open_source` says
    columns = list(next(iter(table_rows(tables[0])), {}))
    if not {"uid", "file_name"} & set(columns) or prompt_column not in columns:
        raise ValueError(
            f"{tables[0]} has the columns {', '.join(columns) or 'none'}; it needs file_name (or uid) and "
            f"{prompt_column}, unless --prompt_column names another"
        )


class Everything(Collection[str]):
    """What every uid is in."""

    def __contains__(self, uid: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def read_picture(picture: Picture) -> torch.Tensor:
    """A picture of a source, (3, H, W) uint8.

    Raises:
        ValueError: there is none, or it cannot be read; with its uid.
    """
    if picture.data is None:
        raise ValueError(f"there is no picture file for {picture.uid}")
    try:
        return to_tensor(decode(picture.data))
    except ValueError as error:
        raise ValueError(f"the picture {picture.uid} cannot be used: {error}") from error


def digest(picture: Picture) -> str:
    """SHA-256 of a picture's file and prompt: whether it is the same picture as before."""
    return hashlib.sha256((picture.data or b"") + (picture.prompt or "").encode()).hexdigest()


def each_once(source: Source, wanted: Collection[str]) -> Iterator[Picture]:
    """A source's pictures, in its order; one that stands there twice, as in two of Pick-a-Pic's pairs, comes once."""
    seen = set()
    for picture in source.pictures(wanted):
        if picture.uid not in seen:
            seen.add(picture.uid)
            yield picture


def check_source(source: Source) -> dict[str, str]:
    """Uid -> `digest` of a source's pictures, in its order, once each of them was looked at.

    Raises:
        ValueError: there is none, one cannot be read, has no prompt, has the name of another, or a name that is no
            file's.
    """
    found: dict[str, str] = {}
    without = []
    for picture in source.pictures(Everything()):
        if picture.uid in found:
            if found[picture.uid] != digest(picture):
                raise ValueError(f"two pictures are called {picture.uid}; results go by that name, so rename one")
            continue
        _check_name(picture.uid)
        read_picture(picture)
        found[picture.uid] = digest(picture)
        if not (picture.prompt or "").strip():
            without.append(picture.uid)
    if not found:
        raise ValueError("there are no pictures; are their files .png, .jpg or .webp?")
    if without:
        more = ", ..." if len(without) > _NAMED else ""
        raise ValueError(
            f"{len(without)} of {len(found)} pictures have no prompt: {', '.join(without[:_NAMED])}{more}; give each a "
            "line in the table of prompts (its file_name and prompt), or name another by --prompts_table"
        )
    return found


def _check_name(uid: str) -> None:
    """Results are written to files of this name, which must not lead out of their folder."""
    path = PurePosixPath(uid)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in uid:
        raise ValueError(f"a picture is called {uid!r}; results go by that name, and it is no file's in their folder")
