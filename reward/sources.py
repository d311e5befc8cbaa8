"""Where the pictures and prompts of RichHF-18K's records come from: three kinds of source, told apart by what is there.

- `PicturePairs`: Pick-a-Pic v1, two pictures and their common caption a row;
- `PictureRows`: a `datasets` data set of one picture and its prompt a row;
- `PictureFolder`: picture files named by uid, and a table (CSV or JSONL) of their prompts.

Each can give further columns along with its pictures, as text (`Columns.kept`).

The first two are parquet files or what `datasets` keeps on disk (arrow). All are streamed (`reward.stored_rows`): at no
time is more than a few rows in memory.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from reward.stored_rows import PICTURE_SUFFIXES, data_files, rows_of, schema_of, table_rows, text_of, uid_of

PAIR_COLUMNS = ("image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "caption")
_TABLE_SUFFIXES = (".csv", ".jsonl")
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
    pa.types.is_null,
)
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_OTHER_PLAIN = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_temporal,
)
_UIDS = (*_TEXT, pa.types.is_integer, lambda kind: isinstance(kind, pa.UuidType))  # what a uid can be

MORE_PICTURES = "more than one picture of that name, and they differ; the first one, by path, that decodes is taken"
MORE_PROMPTS = "more than one row of that uid in the table of prompts, and they differ; the first one is taken"


@dataclass(frozen=True)
class Picture:
    """A picture that a source has.

    Attributes:
        data: the encoded file; None if the source has the uid, but there neither bytes nor a file inside the source.
        prompt: None if the source has none.
        kept: name of a column that is kept -> its value as text; empty where there is none.
    """

    uid: str
    data: bytes | None
    prompt: str | None
    kept: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Columns:
    """What the columns of a one-picture-a-row source, or of a table of prompts, are called.

    Attributes:
        kept: columns of any source that are given along with the pictures, such as the model that made them. Of
            Pick-a-Pic, `model` is the column of that name or, where there is none, `model_0` and `model_1`, of each
            picture its own.
    """

    uid: str = "uid"
    image: str = "image"
    prompt: str = "prompt"
    kept: tuple[str, ...] = ()


class Source(Protocol):
    """Something that has pictures and prompts; `str()` of it says what it is."""

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        """Every picture whose uid is in `wanted` when it is met; one that stands there twice comes twice."""
        ...


@dataclass(frozen=True)
class PicturePairs:
    """Pick-a-Pic v1: parquet or arrow files with `PAIR_COLUMNS`.

    Attributes:
        kept: name -> the column that is kept under it of the left picture, and of the right one.
    """

    folder: Path
    files: Sequence[Path]
    kept: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"Pick-a-Pic v1, two pictures a row: {_count(self.files)} in {self.folder}"

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        names = (*PAIR_COLUMNS, *chain(*self.kept.values()))
        for file in self.files:
            for row in rows_of(file, ("image_0_uid", "image_1_uid"), names, wanted):
                for side in (0, 1):
                    if (uid := uid_of(row[f"image_{side}_uid"])) in wanted:
                        data = _picture_data(row[f"jpg_{side}"], self.folder)
                        kept = {name: text_of(row[columns[side]]) for name, columns in self.kept.items()}
                        yield Picture(uid, data, row["caption"], kept)


@dataclass(frozen=True)
class PictureRows:
    """One picture and its prompt a row: parquet or arrow files with the named columns.

    The picture is bytes, or what `datasets`' `Image` keeps: a struct of bytes and path. A uid may be a file's name.
    """

    folder: Path
    files: Sequence[Path]
    columns: Columns

    def __str__(self) -> str:
        names = f"{self.columns.uid}, {self.columns.image}, {self.columns.prompt}"
        return f"a data set of one picture a row (columns {names}): {_count(self.files)} in {self.folder}"

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        names = (self.columns.uid, self.columns.image, self.columns.prompt, *self.columns.kept)
        for file in self.files:
            for row in rows_of(file, names[:1], names, wanted):
                data = _picture_data(row[self.columns.image], self.folder)
                kept = {name: text_of(row[name]) for name in self.columns.kept}
                yield Picture(uid_of(row[self.columns.uid]), data, row[self.columns.prompt], kept)


@dataclass(frozen=True)
class PictureFolder:
    """Picture files, `<uid>.<suffix>` in any sub-folder, and a table of prompts, a CSV with a header or JSONL.

    Attributes:
        uid_column: its values are uids or, as in `datasets`' image folders, files' names.
        kept: columns of the table that are kept.
    """

    folder: Path
    table: Path
    uid_column: str
    prompt_column: str
    kept: Sequence[str] = ()

    def __str__(self) -> str:
        names = f"{self.uid_column}, {self.prompt_column}"
        return f"a folder of pictures, {self.folder}, with prompts from {self.table} (columns {names})"

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        rows, _ = self._prompts(wanted)
        for path in self._files(wanted):
            row = rows.get(path.stem, {})
            prompt = row.get(self.prompt_column)
            kept = {name: text_of(row.get(name)) for name in self.kept}
            yield Picture(path.stem, path.read_bytes(), prompt if isinstance(prompt, str) else None, kept)

    def ambiguous(self, wanted: Collection[str]) -> dict[str, list[str]]:
        """`MORE_PICTURES` and `MORE_PROMPTS` -> the wanted uids of which it is true. Equal copies are not meant."""
        files: dict[str, list[Path]] = {}
        for path in self._files(wanted):
            files.setdefault(path.stem, []).append(path)
        repeated = {uid: paths for uid, paths in files.items() if len(paths) > 1}
        differing = [
            uid
            for uid, paths in repeated.items()
            if len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) > 1
        ]
        _, several = self._prompts(wanted)
        return {MORE_PICTURES: differing, MORE_PROMPTS: several}

    def _files(self, wanted: Collection[str]) -> Iterator[Path]:
        """The wanted pictures' files: a folder's own by name, then those of its sub-folders, on every file system."""
        for folder, folders, names in os.walk(self.folder):
            folders.sort()
            for path in (Path(folder) / name for name in sorted(names)):
                if path.suffix.lower() in PICTURE_SUFFIXES and path.stem in wanted:
                    yield path

    def _prompts(self, wanted: Collection[str]) -> tuple[dict[str, dict], list[str]]:
        """Of each wanted uid, the table's first row (prompt and what is kept); the uids that have others too."""
        rows: dict[str, dict] = {}
        several: dict[str, None] = {}
        for row in table_rows(self.table):
            if (uid := uid_of(row.get(self.uid_column))) in wanted:
                row = {name: row.get(name) for name in (self.prompt_column, *self.kept)}
                if rows.setdefault(uid, row) != row:
                    several[uid] = None
        return rows, list(several)


def open_source(place: str | Path, columns: Columns | None = None, table: str | Path | None = None) -> Source:
    """Find out what kind of source `place` is, and that it has the columns it needs.

    A `table` makes it a folder of pictures. Else parquet and arrow files are looked for, and a table beside pictures
    only where there are none.

    Args:
        place: a folder, or one parquet file.
        columns: what they are called where that is not fixed, and which are kept.
        table: CSV or JSONL of prompts for a folder of pictures; if None, the only such file in the folder.

    Raises:
        ValueError: `place` is none of the three kinds or lacks a column; the message lists what was found. Or its
            uids, pictures or prompts are of a type that these cannot be, or a column to keep holds something else than
            plain values.
    """
    place, columns = Path(place), columns or Columns()
    if not place.exists():
        raise ValueError(f"there is no source of pictures {place}")
    if table is not None:
        return _open_folder(place, Path(table), columns)
    if files := data_files(place):
        found = schema_of(files[0]).names
        if set(PAIR_COLUMNS) <= set(found):
            sides = {name: _sides(found, name) for name in columns.kept}
            uids, images, prompt = PAIR_COLUMNS[:2], PAIR_COLUMNS[2:4], PAIR_COLUMNS[4]
            kept = tuple(dict.fromkeys(chain(*sides.values())))
            source = PicturePairs(place, files, sides)
        else:
            uids, images, prompt, kept = (columns.uid,), (columns.image,), columns.prompt, columns.kept
            source = PictureRows(place, files, columns)
        for file in files:
            schema = schema_of(file)
            _check_columns(file, schema.names, (*uids, *images, prompt))
            _check_types(file, schema, uids, images, prompt)
            if kept:
                _check_kept(file, schema, kept)
        return source
    tables = sorted(path for path in place.glob("*") if path.suffix.lower() in _TABLE_SUFFIXES)
    if len(tables) != 1:
        raise ValueError(
            f"{place} is no source of pictures: it holds no parquet file, no saved data set, and"
            f" {'no' if not tables else 'more than one'} CSV or JSONL table of prompts"
            f"{''.join(f' {path.name}' for path in tables)}; name the table of a folder of pictures by --prompts_table"
        )
    return _open_folder(place, tables[0], columns)


def _open_folder(folder: Path, table: Path, columns: Columns) -> PictureFolder:
    """A folder of pictures, once its table is known to have the columns; `image` is not one of them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of pictures")
    if not table.is_file() or table.suffix.lower() not in _TABLE_SUFFIXES:
        raise ValueError(f"{table} is no table of prompts; it must be a .csv or .jsonl file")
    found = list(next(iter(table_rows(table)), {}))
    uid = "file_name" if columns.uid not in found and "file_name" in found else columns.uid  # `datasets`' image folder
    _check_columns(table, found, (uid, columns.prompt))
    if columns.kept:
        _check_kept_of_table(table, columns.kept)
    return PictureFolder(folder, table, uid, columns.prompt, columns.kept)


def _sides(found: Collection[str], name: str) -> tuple[str, str]:
    """The columns that `name` means for the left and the right picture of a pair; `name` itself if there are none."""
    sides = (f"{name}_0", f"{name}_1")
    return sides if name not in found and set(sides) <= set(found) else (name, name)


def _check_columns(file: Path, found: Sequence[str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in found]:
        raise ValueError(
            f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(found) or 'none'}. Pick-a-Pic v1 has"
            f" {', '.join(PAIR_COLUMNS)}; other columns are named by --uid_column, --image_column, --prompt_column"
        )


def _check_types(file: Path, schema: pa.Schema, uids: Sequence[str], images: Sequence[str], prompt: str) -> None:
    """Refuse columns of uids, pictures and prompts whose type says that not one of their rows can be such."""

    def check(column: str, fits: bool, what: str, flag: str) -> None:
        if not fits:
            raise ValueError(
                f"{file}: the column {column!r} holds {what}, not {schema.field(column).type}; name the column that"
                f" does by {flag}, or write the file anew"
            )

    for name in uids:
        fits = _is_one_of(schema.field(name).type, _UIDS)
        check(name, fits, "uids and must be text or whole numbers", "--uid_column")
    for name in images:
        fits = _can_be_pictures(schema.field(name).type)
        check(name, fits, "pictures and must be bytes, or a struct of bytes and path", "--image_column")
    check(prompt, _is_one_of(schema.field(prompt).type, _TEXT), "prompts and must be text", "--prompt_column")


def _can_be_pictures(kind: pa.DataType) -> bool:
    """Whether `_picture_data` finds something in a column of that type."""
    if not pa.types.is_struct(kind):
        return _is_one_of(kind, _BYTES)
    tests = {"bytes": _BYTES, "path": _TEXT}
    fields = {part.name: part.type for part in kind.fields if part.name in tests}
    return bool(fields) and all(_is_one_of(of_one, tests[name]) for name, of_one in fields.items())


def _check_kept(file: Path, schema: pa.Schema, kept: Sequence[str]) -> None:
    """Refuse columns to keep that a parquet or arrow file lacks, or that hold something else than plain values."""
    _check_are_there(file, schema.names, kept)
    for name in kept:
        if not _is_one_of(kind := schema.field(name).type, (*_TEXT, *_OTHER_PLAIN)):
            raise ValueError(_not_plain(f"{file}: the column {name!r}", kind))


def _check_kept_of_table(table: Path, kept: Sequence[str]) -> None:
    """Refuse columns to keep that no row of a CSV or JSONL file has, or that hold a list or an object in one."""
    found: dict[str, None] = {}
    for number, row in enumerate(table_rows(table), start=1):
        found |= dict.fromkeys(name for name in row if name is not None)  # None: cells beyond the header's
        for name in kept:
            if isinstance(value := row.get(name), dict | list):
                raise ValueError(_not_plain(f"{table}, row {number}: the column {name!r}", type(value).__name__))
    _check_are_there(table, found, kept)


def _check_are_there(file: Path, found: Collection[str], kept: Sequence[str]) -> None:
    """Refuse columns to keep that are not among those found."""
    if missing := [name for name in kept if name not in found]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)} of --keep_columns; it has {', '.join(found)}")


def _not_plain(where: str, kind: object) -> str:
    """What is said of a column to keep, named by `where`, that holds something else than plain values."""
    return f"{where} holds values of type {kind}; only plain ones (text, numbers, dates) can go into --keep_columns"


def _is_one_of(kind: pa.DataType, tests: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    """Whether a column's type, or what its dictionary holds, passes one of the tests."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(value) for test in tests)


def _picture_data(value: object, folder: Path) -> bytes | None:
    """The bytes of a cell; a path counts only inside the source's own folder."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is not None or not path:
            return data
        file = (folder / path).resolve()
        return file.read_bytes() if file.is_relative_to(folder.resolve()) and file.is_file() else None
    return value if isinstance(value, bytes) else None


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} {files[0].suffix[1:]} file{'s' if len(files) > 1 else ''}"
