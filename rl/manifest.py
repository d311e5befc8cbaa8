"""What the files of a checkpoint must be: their sizes and SHA-256, kept in its completion marker.

Reading back costs one pass over the files at the speed of the disk, also where an engine's states are of gigabytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES, _SEAL = "files", "seal"


def sealed(marker: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`marker` with a manifest of all files below `folder`, and a digest of the whole.

    Args:
        marker: what else it says, as JSON can hold it.
        folder: the checkpoint, whose files are all there, without its marker.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _digest_of_file(file)}
        for file in files
    }
    complete = {**marker, _FILES: manifest}
    return {**complete, _SEAL: _digest(complete)}


def damage(folder: Path, marker: Path, contents: bool) -> str | None:
    """What the first file is that is not as the file `marker` says, in words; None if all are.

    A marker without a manifest says nothing of the files.

    Args:
        contents: compare every byte, not only names and sizes.
    """
    try:
        complete = json.loads(marker.read_text(encoding="utf-8"))
        seal = complete.pop(_SEAL, None)
    except (OSError, ValueError, AttributeError):
        return f"{marker.name} cannot be read"
    if seal is None and _FILES not in complete:
        return None
    if seal != _digest(complete):
        return f"{marker.name} is not what was written"
    for name, expected in complete[_FILES].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes, {expected['bytes']} were written"
        try:
            if contents and _digest_of_file(file) != expected["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _digest_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(marker: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()
