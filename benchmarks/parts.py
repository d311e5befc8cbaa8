"""Parts of a long benchmark: each is done once, in a process and a folder of its own, after the parts that it needs.

A part that is done has its result, `part.json`, in its folder, and is never done again; one that was killed has none,
and is begun anew, unless its process outlives what started it. Other settings, other contents of the files they name,
another generator or predictor, or other needs are another folder. Which code did it is noted, and no key: work of days
goes on while the code does.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from long_runs import ROOT, Budget, assets_digest, digest, write_json

from finetune.fingerprints import code

SCRIPTS = Path(__file__).parent
TASK, RESULT, LOG = "task.json", "part.json", "log.txt"


@dataclass(frozen=True, eq=False)
class Part:
    """Something to be done; a dictionary's key by itself.

    Attributes:
        name: for folder and console.
        seed: of everything random in it.
        script: of this folder, which does it: `python SCRIPT FOLDER`; see `Task`.
        how: what the script is told; JSON can hold it.
        needs: parts that must be done before; the script is told their folders, in this order.
        files: whose contents matter, configs and the like.
    """

    name: str
    seed: int
    script: str
    how: Mapping[str, Any]
    needs: tuple["Part", ...] = ()
    files: tuple[str, ...] = field(default=())

    @cached_property
    def key(self) -> str:
        """Eight digits that differ where anything does that this part comes of."""
        contents = [_said_in(Path(file)) for file in self.files]
        needs = [need.key for need in self.needs]
        return digest(self.name, self.seed, self.script, dict(self.how), needs, contents, assets_digest())

    def folder(self, work: Path) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")
        return work / f"seed{self.seed}" / f"{slug}-{self.key}"

    def result(self, work: Path) -> dict[str, Any] | None:
        """What it came to; None if it is not done."""
        file = self.folder(work) / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _said_in(file: Path) -> Any:
    """What matters of a file; of a YAML, neither comments nor where it writes to."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".yaml":
        return text
    return {name: value for name, value in yaml.safe_load(text).items() if name != "output_dir"}


def with_needs(wanted: Sequence[Part]) -> list[Part]:
    """The parts and all that they need, each once, needs first."""
    found: dict[Part, None] = {}

    def add(part: Part) -> None:
        for need in part.needs:
            add(need)
        found.setdefault(part)

    for part in wanted:
        add(part)
    return list(found)


def finish(
    parts: Sequence[Part],
    work: Path,
    jobs: int,
    budget: Budget,
    start: Callable[[Part, Path], None] | None = None,
    failures: list[str] | None = None,
) -> dict[Part, dict[str, Any]]:
    """Do those that are not done yet, the first ones first where their needs allow it, as far as the budget goes.

    Args:
        parts: with all that they need.
        jobs: parts beside each other.
        start: does one; None: `do`.
        failures: is told of each part that failed, and why; None: they are raised.

    Returns:
        The results of all that are done, in the order of `parts`.

    Raises:
        SystemExit: one failed; all that do not need it are done first, as far as the budget goes.
    """
    assert all(need in parts for part in parts for need in part.needs)
    done = {part: result for part in parts if (result := part.result(work)) is not None}
    for result in done.values():
        budget.note(result["wall"])
    waiting = [part for part in parts if part not in done]
    changed, failed = threading.Condition(), dict[Part, Exception | None]()

    def next_part() -> Part | None:
        with changed:
            while waiting:
                while lost := [part for part in waiting if any(need in failed for need in part.needs)]:
                    failed.update(dict.fromkeys(lost))
                    waiting[:] = [part for part in waiting if part not in lost]
                ready = next((part for part in waiting if all(need in done for need in part.needs)), None)
                if ready is not None:
                    if not budget.allows_another():
                        waiting.clear()
                        break
                    waiting.remove(ready)
                    return ready
                if waiting:
                    changed.wait()  # for a part that runs, and that this one needs
            changed.notify_all()
            return None

    def one_after_another() -> None:
        while (part := next_part()) is not None:
            try:
                (start or do)(part, work)
                result = part.result(work)
                if result is None:
                    raise PartFailedError(f"{part.folder(work)} has no {RESULT}")
            except Exception as failure:
                with changed:
                    failed[part] = failure
                    print(f"{part.name}, seed {part.seed}, failed", flush=True)
                    changed.notify_all()
                continue
            with changed:
                done[part] = result
                budget.note(done[part]["wall"])
                print(f"{len(done)} of {len(parts)}: {part.name}, seed {part.seed}, {done[part]['wall']:.0f} s",
                      flush=True)  # fmt: skip
                changed.notify_all()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(lambda _: one_after_another(), range(jobs)))
        except KeyboardInterrupt:
            with changed:  # what runs is ended by the same Ctrl-C, and nothing more is begun
                waiting.clear()
                changed.notify_all()
            raise
    found = [] if failures is None else failures
    found += [f"{part.name}, seed {part.seed}, failed; what is done is kept. {why}"
              for part, why in failed.items() if why is not None]  # fmt: skip
    if failures is None and found:
        raise SystemExit("\n".join(found))
    return {part: done[part] for part in parts if part in done}


class PartFailedError(Exception):
    """Holds what the part said."""


def do(part: Part, work: Path) -> None:
    """Do a part, on one thread, in a folder that is empty.

    Raises:
        PartFailedError: its process failed; or another process still does it.
    """
    folder = part.folder(work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PartFailedError(f"a process of an earlier start still does it, in {folder}; end it first") from error
        _do(part, folder, work, lock.fileno())


def _do(part: Part, folder: Path, work: Path, lock: int) -> None:
    """With a lock that the process takes over, so that whoever starts it may be killed."""
    shutil.rmtree(folder, ignore_errors=True)
    needs = [str(need.folder(work).absolute()) for need in part.needs]
    write_json(folder / TASK, {"name": part.name, "seed": part.seed, "how": dict(part.how), "needs": needs})
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(SCRIPTS / part.script), str(folder.absolute())]
    with (folder / LOG).open("w+", encoding="utf-8") as log:
        ended = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, pass_fds=(lock,)
        )
        if ended.returncode != 0:
            log.seek(0)
            raise PartFailedError(f"{folder / LOG} ends with:\n{log.read()[-2000:]}")


@dataclass(frozen=True)
class Task:
    """What a part's process is to do.

    Attributes:
        folder: its own.
        needs: the folders of the parts that it needs.
    """

    folder: Path
    seed: int
    how: Mapping[str, Any]
    needs: Sequence[Path]

    @classmethod
    def read(cls, folder: Path) -> "Task":
        told = json.loads((folder / TASK).read_text(encoding="utf-8"))
        return cls(folder, told["seed"], told["how"], [Path(need) for need in told["needs"]])

    def finish(self, work: Callable[["Task"], Mapping[str, Any]]) -> None:
        """Do it, and write what comes of it, JSON can hold it, as the part's result."""
        began, made_by = time.perf_counter(), code()
        found = work(self)
        write_json(self.folder / RESULT, {**found, "wall": round(time.perf_counter() - began, 1), "code": made_by})
