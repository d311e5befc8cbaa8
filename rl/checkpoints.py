"""The output folder of a run: whose it is, which checkpoints in it are whole, and how one is written.

A checkpoint is written beside its place, gets its completion marker last, and is then renamed: whatever happens on the
way, the previous one stays whole, and a folder without the marker is never resumed from. The marker says what every
file must be (`rl.manifest`), so that damage is found before anything goes on from it.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reward.checkpoint_folders import ABANDONED, checkpoints, discard, step_of
from rl.manifest import damage

logger = logging.getLogger(__name__)

MARKER = "complete.json"
RUN_CONFIG = "run_config.json"
BESIDE = ".incomplete"
BEFORE = ".before"  # what an earlier run left, until the one that takes its place has made an update
LOGS = "runs"
SAMPLES = "samples"
REPLACED = ".replaced"  # behind the name of a checkpoint that another has taken the place of
FINISHED = "finished.json"
RESULTS = (
    *("summary.json", "evaluation.json", "before_after.png", "pytorch_lora_weights.safetensors", FINISHED),
    *("README.md", "curves.png"),
)
LASTING = (*RESULTS, "unet")  # what a run is for
FOLDERS = (LOGS, SAMPLES, "scheduler", "unet", BESIDE)

_LATEST, _AUTO = ("latest", "true", "yes", "1"), "auto"
_BOTH = "overwrite_output_dir would delete the run that resume_from_checkpoint goes on with; give one of them"
_FREE_TO_CHANGE = (
    "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "disable_tqdm", "log_level", "local_rank",
)  # fmt: skip


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / MARKER).is_file()


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return list(filter(is_complete, checkpoints(output_dir)))


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that is meant, None for none: a folder; `latest`, the newest whole one of `output_dir`; or `auto`,
    that one if there is any.

    Raises:
        ValueError: there is no such folder, it was not completely written, or a file of it is missing or cut short.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    _bring_back(output_dir)
    offer = newest_whole(output_dir)
    if str(resume_from_checkpoint).lower() in (*_LATEST, _AUTO):
        available = complete_checkpoints(output_dir)
        if not available and not _is_auto(resume_from_checkpoint):
            raise ValueError(f"resume_from_checkpoint {resume_from_checkpoint}: {offer}")
        checkpoint = available[-1] if available else None
    else:
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint}; {offer}")
        if not is_complete(checkpoint):
            raise ValueError(f"the checkpoint {checkpoint} was not completely written (it lacks {MARKER}); {offer}")
    if checkpoint is not None:
        check_intact(checkpoint, contents=False)
    return checkpoint


def _bring_back(output_dir: str | Path) -> None:
    """Give a whole checkpoint its name again that `publish` moved aside, where it was killed before the next stood
    there."""
    for replaced in Path(output_dir).glob(f"checkpoint-*{REPLACED}"):
        place = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if is_complete(replaced) and not place.exists():
            with suppress(FileNotFoundError):  # another rank was first
                os.replace(replaced, place)


def _is_auto(resume_from_checkpoint: str | bool | None) -> bool:
    return str(resume_from_checkpoint).lower() == _AUTO


def check_intact(checkpoint: Path, contents: bool = True) -> None:
    """Look whether the files of a whole checkpoint are what was written; one without a manifest passes.

    Args:
        contents: read every byte; else only look whether all files are there, in their sizes.

    Raises:
        ValueError: they are not; the message names the file, and the newest good checkpoint beside this one.
    """
    if (harm := _harm(checkpoint, contents)) is None:
        return
    others = [other for other in reversed(complete_checkpoints(checkpoint.parent)) if other != checkpoint]
    good = next((other for other in others if _harm(other, contents=True) is None), None)
    offer = f"the newest good checkpoint is {good}, go on with --resume_from_checkpoint {good}"
    none = f"{checkpoint.parent} holds no other good checkpoint"
    raise ValueError(f"the checkpoint {checkpoint} is damaged: {harm}; {offer if good else none}")


def _harm(checkpoint: Path, contents: bool) -> str | None:
    return damage(checkpoint, checkpoint / MARKER, contents)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))


def newest_whole(output_dir: str | Path, contents: bool = False) -> str:
    """Where a run can go on from, in words for the end of a message.

    Args:
        contents: read every byte of it; else only look whether all files are there, in their sizes.
    """
    newest = next((one for one in reversed(complete_checkpoints(output_dir)) if _harm(one, contents) is None), None)
    return f"the newest whole checkpoint is {newest}" if newest else f"{output_dir} holds no whole checkpoint"


# ---- Writing: on the disk before it has its name ----


def publish(beside: Path, place: Path, marker: Mapping[str, Any]) -> None:
    """Complete a checkpoint that was written to `beside` with its marker, and move it to its `place`.

    A checkpoint that is there already is moved aside first and deleted last, so that one of the two is always whole.
    """
    for file in beside.rglob("*"):
        _sync(file)
    (beside / MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
    _sync(beside / MARKER)
    _sync(beside)
    replaced = place.with_name(place.name + REPLACED)
    discard(replaced, MARKER)
    if place.exists():
        os.replace(place, replaced)
    os.replace(beside, place)
    _sync(place.parent)
    discard(replaced, MARKER)


def rotate(output_dir: str | Path, save_total_limit: int | None, best: Path | None = None) -> None:
    """Keep the newest `save_total_limit` whole checkpoints (None or 0: all) and the `best`; nothing unfinished below
    them."""
    if save_total_limit and save_total_limit > 0 and (kept := complete_checkpoints(output_dir)[-save_total_limit:]):
        for folder in checkpoints(output_dir):
            if step_of(folder) < step_of(kept[0]) and folder != best:
                discard(folder, MARKER)


def discard_later_samples(rollouts: int, output_dir: str | Path) -> None:
    """Delete the sheets in `samples` that are later than so many rollouts, from which a run goes on."""
    for file in (Path(output_dir) / SAMPLES).glob("rollout-*.png"):
        if file.stem[8:].isdigit() and int(file.stem[8:]) > rollouts:
            file.unlink()


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder to write to; at the end its files move into `folder`, replacing those of the same names there.

    After an error nothing in `folder` has changed: what is there is never half old, half new, or half written.
    """
    beside = folder / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        files = [path for path in sorted(beside.rglob("*")) if path.is_file()]
        for file in files:
            _sync(file)
        for file in files:
            place = folder / file.relative_to(beside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def explained(what: str, output_dir: str | Path) -> Iterator[None]:
    """What cannot be written, e.g. because the disk is full, becomes one OSError: `what`, why, what is still whole."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise  # torch.save's reports of a full disk name these; any other is a bug
        raise OSError(f"cannot write {what}: {error}; {newest_whole(output_dir, contents=True)}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Whose folder it is ----


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        checkpoint: what it goes on from; None: it begins.
        keep: what is in the output folder stays there; else it is deleted first.
        finished: the very same run is there and has ended: there is nothing to do.
    """

    checkpoint: Path | None
    keep: bool
    finished: bool = False


def plan_start(
    resume_from_checkpoint: str | bool | None,
    output_dir: str | Path,
    config: Mapping[str, Any],
    overwrite: bool,
    thorough: bool = True,
) -> Start:
    """How a run of the settings `config` starts in `output_dir`; touches nothing, and says the same on every rank.

    With `auto` one command both starts a run and goes on with it, so it takes up a run of the same settings only.

    Args:
        thorough: read every byte of the checkpoint, and try whether the folder can be written to; one rank suffices.

    Raises:
        ValueError: see `resolve_checkpoint`, `check_output_dir`, `check_intact` and `check_writable`.
    """
    start = _plan_start(resume_from_checkpoint, Path(output_dir), config, overwrite)
    if thorough and not start.finished:
        check_writable(output_dir)
        if start.checkpoint is not None:
            check_intact(start.checkpoint)
    return start


def _plan_start(
    resume_from_checkpoint: str | bool | None, folder: Path, config: Mapping[str, Any], overwrite: bool
) -> Start:
    if _is_auto(resume_from_checkpoint):
        if overwrite:
            raise ValueError(_BOTH)
        check_output_dir(folder, config, overwrite=False, resume=False, again=True)
        if (folder / FINISHED).is_file():
            return Start(None, keep=True, finished=True)
        checkpoint = resolve_checkpoint(_AUTO, folder)
        return Start(checkpoint, keep=checkpoint is not None)
    checkpoint = resolve_checkpoint(resume_from_checkpoint, folder)
    own = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    elsewhere = checkpoint is not None and not own
    check_output_dir(folder, config, overwrite, resume=own, again=elsewhere)
    if elsewhere and (changed := _changed(checkpoint.parent, config)):
        logger.warning("resuming %s with other settings than it was made with: %s", checkpoint, "; ".join(changed))
    return Start(checkpoint, keep=own or (elsewhere and not overwrite))


def check_output_dir(
    output_dir: str | Path, config: Mapping[str, Any], overwrite: bool, resume: bool, again: bool = False
) -> None:
    """Complain if a run of the settings `config` may not start in `output_dir`; touches nothing.

    Args:
        config: the settings, as JSON can hold them.
        overwrite: what another run left there may be deleted.
        resume: the run that is there goes on.
        again: what a run of the same settings left there is no obstacle.

    Raises:
        ValueError: it is a file, or a link to nothing; it holds a run of other settings (they are listed), or results
            of the same ones, and neither `overwrite` nor `resume` is set; or both are; or it is no run's, but holds
            files of the names of theirs.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"output_dir {folder} is a link to {folder.readlink()}, which is not there; make that folder")
    if overwrite and resume:
        raise ValueError(_BOTH)
    remedy = "give another --output_dir, --resume_from_checkpoint latest to go on, or --overwrite_output_dir"
    if not (folder / RUN_CONFIG).is_file():
        if complete_checkpoints(folder):
            if not (overwrite or resume):
                raise ValueError(f"output_dir {folder} holds checkpoints of another run; {remedy}")
        elif found := [name for name in (*RESULTS, *FOLDERS) if (folder / name).exists()]:
            raise ValueError(
                f"output_dir {folder} is no run's, but holds {', '.join(found)}, which a run would write over; "
                "give another --output_dir"
            )
        return
    changed = _changed(folder, config)
    if resume:
        if changed:
            logger.warning("resuming with other settings than before: %s", "; ".join(changed))
    elif changed and not overwrite:
        raise ValueError(f"output_dir {folder} holds a run of other settings ({'; '.join(changed)}); {remedy}")
    elif overwrite or again:
        return
    elif any((folder / name).exists() for name in LASTING):
        raise ValueError(f"output_dir {folder} holds a finished run of the same settings; {remedy}")
    elif complete_checkpoints(folder):
        raise ValueError(f"output_dir {folder} holds an unfinished run of the same settings; {remedy}")


def check_writable(output_dir: str | Path) -> None:
    """Complain if nothing can be written to `output_dir`, or to where it would be made; leaves nothing there.

    Raises:
        ValueError: it is read-only, or not this user's.
    """
    folder = Path(output_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        there = f"; {newest_whole(output_dir)}" if complete_checkpoints(output_dir) else ""
        raise ValueError(
            f"cannot write to output_dir {output_dir} ({place}: {error.strerror}); give another --output_dir{there}"
        ) from error


def claim_output_dir(output_dir: str | Path, config: Mapping[str, Any], resume: bool) -> None:
    """Make `output_dir` this run's and note its settings there in run_config.json; for after `check_output_dir`.

    Unless `resume` is set, what an earlier run left there is set aside (only what runs write; other files stay), until
    `forget_before` deletes it or `restore_before` brings it back.
    """
    folder = Path(output_dir)
    with explained(f"to the output folder {folder}", folder):
        if resume:
            forget_before(folder)
            _keep_copies(folder, (RUN_CONFIG, FINISHED))
        elif complete_checkpoints(folder) or any((folder / name).exists() for name in LASTING):
            _set_aside(folder)
        elif (folder / RUN_CONFIG).is_file():  # begun, and nothing else
            _clear(folder)
        with written_beside(folder) as beside:
            (folder / FINISHED).unlink(missing_ok=True)
            (beside / RUN_CONFIG).write_text(json.dumps(_as_json(config), indent=2, sort_keys=True), encoding="utf-8")


def restore_before(output_dir: str | Path) -> None:
    """Bring back what `claim_output_dir` set aside, in place of what the new run, which failed, left instead."""
    folder = Path(output_dir)
    for kept in sorted((folder / BEFORE).glob("*")):
        place = folder / kept.name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        os.replace(kept, place)
    forget_before(folder)


def forget_before(output_dir: str | Path) -> None:
    """Delete what was set aside, as the new run has something to show for itself."""
    shutil.rmtree(Path(output_dir) / BEFORE, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    (folder / BEFORE).mkdir(exist_ok=True)
    for path in _written(folder):
        place = folder / BEFORE / path.name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        os.replace(path, place)


def _keep_copies(folder: Path, names: Iterable[str]) -> None:
    (folder / BEFORE).mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copy2(folder / name, folder / BEFORE / name)


def mark_finished(output_dir: str | Path, updates: int) -> None:
    """Note that the run in `output_dir` has ended after so many updates, with all that it writes."""
    with explained(f"to the output folder {output_dir}", output_dir), written_beside(Path(output_dir)) as beside:
        (beside / FINISHED).write_text(json.dumps({"updates": updates}), encoding="utf-8")
    forget_before(output_dir)


def _changed(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The settings of the run in `folder` that `config` has other values of; none where it left no run_config.json."""
    if not (folder / RUN_CONFIG).is_file():
        return []
    try:
        before = dict(json.loads((folder / RUN_CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return [f"{RUN_CONFIG} cannot be read: {error}"]
    return differing_keys(before, _as_json(config))


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` of every setting that differs and matters."""
    keys = sorted((before.keys() | now.keys()) - set(_FREE_TO_CHANGE))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, default=str))


def _clear(folder: Path) -> None:
    for path in _written(folder):
        discard(path, MARKER) if path.is_dir() else path.unlink()


def _written(folder: Path) -> Iterator[Path]:
    """What runs write into their folder and is there; run_config.json, which says whose it is, last."""
    for path in sorted(folder.glob("checkpoint-*")):
        if re.fullmatch(rf"checkpoint-\d+({re.escape(REPLACED)}|{re.escape(ABANDONED)})?", path.name):
            yield path
    yield from (folder / name for name in (*FOLDERS, *RESULTS, RUN_CONFIG) if (folder / name).exists())
