"""Files that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced_parts(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """An empty folder to write to; at the end the files and folders `parts` of it take the place of those in `folder`.

    What else `folder` holds stays as it is, and after an error all of it does. The first part is the first to go and
    the last to come: where it is, all are of one writing.
    """
    folder = folder.resolve()  # moves must not cross from one disk to another, nor those of a folder that is a disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{folder.name}.*/new"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=folder if folder.is_dir() else folder.parent, prefix=f".{folder.name}."))
    new, before = aside / "new", aside / "before"
    new.mkdir()
    before.mkdir()
    try:
        yield new
        if folder.exists():
            moves = [(folder / name, before / name) for name in parts if (folder / name).exists()]
            moves += [(new / name, folder / name) for name in reversed(parts) if (new / name).exists()]
            _move_all(moves)
            shutil.rmtree(before)
        else:
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # what could not be put back must not be deleted
            before.rmdir()
        with suppress(OSError):
            aside.rmdir()


def holds_files(folder: Path) -> bool:
    """Whether a folder holds anything but what `replaced_parts` and `write_whole` leave where they are killed, and what
    every new disk has."""
    aside = f".{folder.resolve().name}."
    return any(
        not (name == "lost+found" or name.startswith(aside) or (name.startswith(".") and name.endswith(".part")))
        for name in (path.name for path in folder.iterdir())
    )


def is_within(place: str | Path, folder: str | Path) -> bool:
    """Whether a path is `folder` or lies in it, whatever they are called."""
    return Path(place).resolve().is_relative_to(Path(folder).resolve())


def _move_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """From the first of each pair to the second; if one cannot be moved, those before it are moved back."""
    with ExitStack() as back:
        for source, target in moves:
            os.replace(source, target)
            back.callback(os.replace, target, source)
        back.pop_all()
