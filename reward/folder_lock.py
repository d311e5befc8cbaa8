"""At most one run writes to a folder: every process of a run holds the kernel's lock on a file in it while it lives.

A run whose launcher alone was killed may still have workers that write. The kernel takes the lock back when the last of
them has ended, however it ended, so nothing is ever left to clean up.
"""

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

LOCK = ".lock"


class FolderInUseError(ValueError):
    """Another run is writing to the output folder."""


def check_free(output_dir: str | Path) -> None:
    """Look whether a run is writing to `output_dir`; touches nothing.

    Raises:
        FolderInUseError: it is.
    """
    if (Path(output_dir) / LOCK).is_file():
        with (Path(output_dir) / LOCK).open("r+", encoding="utf-8") as file:
            _lock(file, exclusive=True)


@contextmanager
def taken(output_dir: str | Path) -> Iterator[TextIO]:
    """Inside, no other run may write to `output_dir`, which is made; for a run of one process. Gives the lock's file.

    Raises:
        FolderInUseError: another run has it.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with (Path(output_dir) / LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, exclusive=True)
        file.truncate(0)
        _sign(file)
        yield file


@contextmanager
def held(
    output_dir: str | Path, first: bool, all_here: Callable[[], None], prepare: Callable[[], None] | None = None
) -> Iterator[None]:
    """Inside, no other run may write to `output_dir`, which is made; on all ranks of one.

    Args:
        first: whether this is the rank that saves.
        all_here: waits for the other ranks.
        prepare: what the first one does to the folder before the others come.

    Raises:
        FolderInUseError: another run has it.
        ValueError: the first rank's folder is not to be seen from here.
    """
    with ExitStack() as stack:
        if first:
            file = stack.enter_context(taken(output_dir))
            if prepare is not None:
                prepare()
            _lock(file, exclusive=False)  # the other ranks may hold it too, other runs still may not
        all_here()
        if not first:
            stack.enter_context(_joined(output_dir))
        yield


@contextmanager
def _joined(output_dir: str | Path) -> Iterator[None]:
    if not (Path(output_dir) / LOCK).is_file():
        raise ValueError(
            f"output_dir {output_dir} of the first process is not to be seen from {socket.gethostname()}; "
            "several machines need one on a disk that all of them see"
        )
    with (Path(output_dir) / LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, exclusive=False)
        _sign(file)
        yield


def _sign(file: TextIO) -> None:
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _lock(file: TextIO, exclusive: bool) -> None:
    import fcntl  # not on Windows

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        processes = ", ".join(file.read().split("\n")[:-1])
        raise FolderInUseError(
            f"output_dir {Path(file.name).parent} is in use by another run (its processes: {processes}), which may go "
            "on where only its launcher was killed; wait for it, end it, or give another --output_dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        logger.warning("%s is on a disk that knows no locks: nothing keeps a second run out of it", file.name)
