"""Files that are there whole or not at all, and what is kept of an earlier run until another has taken its place."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BEFORE = ".before"  # holds what was set aside
_GONE = ".before.gone"  # what was there is being deleted


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to; at the end, when it is on the disk, it takes its place there.

    After an error, or where the process is killed, what was there before is unharmed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file by `whole_file`.

    Raises:
        OSError: it could not be written; the message names it.
    """
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was written before it is kept") from error


# ---- What a new run replaces: kept until it has something to show for itself ----


def set_aside(folder: str | Path, paths: Iterable[Path]) -> None:
    """Move `paths`, which lie in `folder`, to where `bring_back` finds them, the first one first."""
    before = Path(folder) / BEFORE
    for path in paths:
        before.mkdir(exist_ok=True)
        _remove(before / path.name)
        os.replace(path, before / path.name)


def bring_back(folder: str | Path) -> None:
    """Move what was set aside back, in place of what has come there since.

    Killed on the way, here or in `set_aside`, it ends the same when it is called again.
    """
    folder = Path(folder)
    for kept in sorted((folder / BEFORE).glob("*")):
        _remove(folder / kept.name)
        os.replace(kept, folder / kept.name)
    forget(folder)


def forget(folder: str | Path) -> None:
    """Delete what was set aside."""
    before, gone = Path(folder) / BEFORE, Path(folder) / _GONE
    if gone.exists():  # its deletion was cut short
        shutil.rmtree(gone, ignore_errors=True)
    if before.exists():
        os.replace(before, gone)  # first: half of it must not be brought back
        shutil.rmtree(gone, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
