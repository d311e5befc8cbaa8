"""Checkpoints of a training of the predictor: which are whole, what they were made with, which one it goes on from.

Trainer writes and deletes them in place. Their marker, written when all else is there and deleted first, tells a whole
one from a torn one, and says what made it: Trainer would load the rest under other settings too, and say nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward.checkpoint_folders import ABANDONED, checkpoints, discard
from reward.whole_files import write_whole

COMPLETE = "complete"
"""The marker. Before it said anything it was empty, and is understood so still."""
_NEWEST = ("latest", "last", "true")


def abandoned(folder: str | Path) -> list[Path]:
    """What `abandon_later` has left in the output folder."""
    return sorted(Path(folder).glob(f"checkpoint-*{ABANDONED}"))


def is_whole(checkpoint: Path) -> bool:
    return (checkpoint / COMPLETE).is_file()


def mark_whole(checkpoint: Path, made_with: Mapping[str, Any]) -> None:
    """Say that all files of a checkpoint are there.

    Args:
        made_with: what the training that goes on with it must have too; JSON can hold it.
    """
    write_whole(checkpoint / COMPLETE, json.dumps(dict(made_with), indent=1, default=str).encode())


def unmark(checkpoint: Path) -> None:
    """Say that files of it may be missing."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)


def rotate(folder: str | Path, limit: int | None, best: str | Path | None) -> None:
    """Delete the oldest checkpoints until there are `limit` (None or 0: all stay), never the newest or the `best`."""
    found = checkpoints(folder)
    if not limit or limit < 0 or len(found) <= limit:
        return
    kept = {found[-1], *([Path(best)] if best else [])}
    for checkpoint in [one for one in found if one not in kept][: len(found) - max(limit, len(kept))]:
        discard(checkpoint, COMPLETE)


def checkpoint_to_resume(wanted: str | bool | None, folder: str | Path) -> Path | None:
    """The checkpoint that is meant, None for none: a folder; `latest` or `last`, the newest whole one of the output
    `folder`; or `auto`, that one if there is any.

    Raises:
        ValueError: there is no such folder, or files of it may be missing; or there is no whole one.
    """
    if wanted in (None, False):  # False is what YAML makes of `no`
        return None
    auto = str(wanted).lower() == "auto"
    if not auto and str(wanted).lower() not in _NEWEST:
        if not is_whole(Path(wanted)):
            raise ValueError(
                f"{wanted} is not a whole checkpoint; `--resume_from_checkpoint latest` finds the last one"
            )
        return Path(wanted)
    if whole := list(filter(is_whole, checkpoints(folder))):
        return whole[-1]
    if auto:
        return None
    raise ValueError(
        f"{folder} has no whole checkpoint to resume from; leave --resume_from_checkpoint out, or let it be auto"
    )


def check_goes_on(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Complain if the training that goes on with a checkpoint is not the one that made it.

    Args:
        now: as given to `mark_whole`, or a part of it.

    Raises:
        ValueError: lists what differs.
    """
    said = (checkpoint / COMPLETE).read_text(encoding="utf-8")
    before = json.loads(said) if said else {}
    now = json.loads(json.dumps(dict(now), default=str))
    names = [name for name in before if name in now and before[name] != now[name]]
    if changed := [f"{name}: {before[name]!r} -> {now[name]!r}" for name in names]:
        raise ValueError(
            f"{checkpoint} was made with other settings ({'; '.join(changed)}); go on with those, or begin anew from "
            f"its weights, --model {checkpoint} and another --output_dir"
        )
