"""The folders `checkpoint-<step>` of a training: which there are, and how one ceases to be one.

A checkpoint is whole if its marker is there, a file of a name that its training has chosen.
"""

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

ABANDONED = ".abandoned"  # behind the name of a checkpoint that is one no more


def checkpoints(folder: str | Path) -> list[Path]:
    """Those in the output folder, whole or not, by step."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """40 of `checkpoint-40`."""
    return int(checkpoint.name[11:])


def discard(checkpoint: Path, marker: str) -> None:
    """Delete it, if it is there; the marker goes first, so that half a checkpoint never passes for a whole one."""
    if checkpoint.is_dir():
        (checkpoint / marker).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def abandon_later(step: int, folder: str | Path, marker: str) -> None:
    """Rename the checkpoints of the output folder that are later than `step`, from which a training goes on: they are
    of another branch now, and must neither be the newest nor be written into, nor push out new ones."""
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) > step:
            place = checkpoint.with_name(checkpoint.name + ABANDONED)
            discard(place, marker)
            os.replace(checkpoint, place)
            logger.warning(
                "going on from update %d: %s is of the branch that is left, now %s", step, checkpoint, place.name
            )
