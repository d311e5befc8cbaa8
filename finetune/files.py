"""Files that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, data: bytes) -> None:
    """Write a file beside its place and move it there.

    Raises:
        OSError: it could not be written; the message names it, and what was there before is unharmed.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error.strerror}; what was written before it is kept") from error


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` at the end; after an error nothing has changed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is for its owner alone
        if folder.exists():
            before = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            os.replace(folder, before)
            os.replace(unfinished, folder)
            shutil.rmtree(before)
        else:
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
