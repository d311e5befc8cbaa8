"""The output folder of a run: whose it is, which checkpoints in it are whole, and how one is written.

A checkpoint is written beside its place, gets its completion marker last, and is then renamed: whatever happens on the
way, the previous one stays whole, and a folder without the marker is never resumed from.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER = "complete.json"
RUN_CONFIG = "run_config.json"
BESIDE = ".incomplete"
RESULTS = ("summary.json", "evaluation.json", "before_after.png", "pytorch_lora_weights.safetensors", RUN_CONFIG)
FOLDERS = ("runs", "scheduler", BESIDE)

_LATEST = ("latest", "true", "yes", "1")
_FREE_TO_CHANGE = ("resume_from_checkpoint", "overwrite_output_dir", "output_dir", "disable_tqdm", "log_level")


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / MARKER).is_file()


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(filter(is_complete, folders), key=lambda folder: int(folder.name[11:]))


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that is meant: a folder, or `latest` for the newest whole one of `output_dir`; None for none.

    Raises:
        ValueError: there is no such folder, or it was not completely written.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    available = complete_checkpoints(output_dir)
    offer = f"the newest whole one is {available[-1]}" if available else f"{output_dir} holds no whole one"
    if str(resume_from_checkpoint).lower() in _LATEST:
        if not available:
            raise ValueError(f"resume_from_checkpoint {resume_from_checkpoint}: {offer}")
        return available[-1]
    checkpoint = Path(resume_from_checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint}; {offer}")
    if not is_complete(checkpoint):
        raise ValueError(f"the checkpoint {checkpoint} was not completely written (it lacks {MARKER}); {offer}")
    return checkpoint


def read_marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def publish(beside: Path, place: Path, marker: Mapping[str, Any]) -> None:
    """Complete a checkpoint that was written to `beside` with its marker, and move it to its `place`."""
    with open(beside / MARKER, "w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    os.replace(beside, place)


def claim_output_dir(
    output_dir: str | Path,
    config: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
    write: bool = True,
) -> None:
    """Make `output_dir` this run's and note its settings there in run_config.json.

    Args:
        config: the settings, as JSON can hold them.
        overwrite: delete what another run left there (only what runs write; other files stay).
        resume: go on with the run that is there.
        write: False on ranks that only check.

    Raises:
        ValueError: the folder holds a run of other settings (they are listed), or an unfinished run of the same ones,
            and neither `overwrite` nor `resume` is set.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder")
    config = json.loads(json.dumps(config, default=str))
    remedy = "give another --output_dir, --resume_from_checkpoint latest to go on, or --overwrite_output_dir"
    if (folder / RUN_CONFIG).is_file():
        changed = differing_keys(json.loads((folder / RUN_CONFIG).read_text(encoding="utf-8")), config)
        if resume:
            if changed:
                logger.warning("resuming with other settings than before: %s", "; ".join(changed))
        elif changed and not overwrite:
            raise ValueError(f"output_dir {folder} holds a run of other settings ({'; '.join(changed)}); {remedy}")
        elif complete_checkpoints(folder) and not overwrite and not (folder / "summary.json").is_file():
            raise ValueError(f"output_dir {folder} holds an unfinished run of the same settings; {remedy}")
    elif complete_checkpoints(folder) and not (overwrite or resume):
        raise ValueError(f"output_dir {folder} holds checkpoints of another run; {remedy}")
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and ((folder / RUN_CONFIG).is_file() or complete_checkpoints(folder)):
        _clear(folder)
    temporary = folder / f"{RUN_CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(temporary, folder / RUN_CONFIG)


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` of every setting that differs and matters."""
    keys = sorted((before.keys() | now.keys()) - set(_FREE_TO_CHANGE))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _clear(folder: Path) -> None:
    for old in (*folder.glob("checkpoint-*"), *(folder / name for name in FOLDERS)):
        shutil.rmtree(old, ignore_errors=True)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
