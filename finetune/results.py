"""A folder of results that grows by a picture at a time, and goes on where it was stopped; and what changed in them.

`results.jsonl` holds a line for each picture that is done. The line is written when the picture's files are in their
places, so what has a line is whole; what has none is made again.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from finetune.fingerprints import with_weights
from finetune.paired import paired_interval
from reward.folder_lock import FolderInUseError, check_free, taken
from rl.checkpoints import BESIDE, RUN_CONFIG, check_writable, differing_keys, written_beside

RESULTS, SUMMARY = "results.jsonl", "summary.json"


class Results:
    """The results of one command in one folder.

    Args:
        folder: made if it is not there.
        settings: what the results depend on; JSON can hold it.
        parts: files and folders in `folder` that the command writes besides `results.jsonl`.
        overwrite: results of other settings that are there may be deleted.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], parts: tuple[str, ...], overwrite: bool):
        """Look whether the folder is free, or holds results of the same settings; touches nothing.

        Raises:
            ValueError: it holds those of other settings (they are listed) and may not be overwritten, is a file,
                cannot be written to, or another run writes to it.
        """
        self.folder, self._parts, self._overwrite = Path(folder), parts, overwrite
        self._settings = json.loads(json.dumps(settings, default=str))
        self.rows: dict[str, dict] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output_dir {folder} is a file; name a folder")
        check_writable(folder)
        check_free(folder)
        if overwrite or not self.folder.is_dir():
            return
        if (self.folder / RUN_CONFIG).is_file():
            before = with_weights(json.loads((self.folder / RUN_CONFIG).read_text(encoding="utf-8")), self._settings)
            if changed := differing_keys(before, self._settings):
                raise ValueError(
                    f"output_dir {folder} holds results of other settings ({'; '.join(changed)}); "
                    "give another --output_dir, or --overwrite_output_dir true"
                )
            self.rows = {row["uid"]: row for row in _whole_lines(self.folder / RESULTS)}
        elif there := [name for name in (RESULTS, *parts) if (self.folder / name).exists()]:
            raise ValueError(
                f"output_dir {folder} holds {', '.join(there)} of something else; "
                "give another --output_dir, or --overwrite_output_dir true"
            )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Make the folder these results', once nothing else can be wrong; if it may be overwritten, it is cleared.

        Within it no other run may write there.

        Raises:
            FolderInUseError: another run does, or has since this one looked.
        """
        with taken(self.folder):
            if not self._overwrite and len(_whole_lines(self.folder / RESULTS)) != len(self.rows):
                raise FolderInUseError(f"another run has just written to {self.folder}; start this one again")
            self._begin()
            yield

    def _begin(self) -> None:
        if self._overwrite:
            for name in (RESULTS, RUN_CONFIG, *self._parts, BESIDE):
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.write({RUN_CONFIG: self._settings})
        lines = self.folder / RESULTS
        if lines.exists():  # the last line may have been cut short
            os.truncate(lines, _whole_length(lines.read_bytes()))

    def add(self, uid: str, row: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
        """Put a picture's files, path in the folder -> image, in their places, and then its line."""
        with written_beside(self.folder) as beside:
            for name, image in pictures.items():
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(beside / name)
        self.rows[uid] = {"uid": uid, **row}
        with (self.folder / RESULTS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(self.rows[uid]) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def are_summed_up(self, summary: Mapping[str, Any]) -> bool:
        """Whether `summary` is what was written as `SUMMARY`: not if the run that added the last picture was killed."""
        file = self.folder / SUMMARY
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == summary

    def write(self, files: Mapping[str, Mapping | Image.Image]) -> None:
        """Write files of the whole run, name -> an image, or a mapping that becomes JSON."""
        with written_beside(self.folder) as beside:
            for name, content in files.items():
                if isinstance(content, Mapping):
                    (beside / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
                else:
                    content.save(beside / name)


def changes(rows: Sequence[Mapping[str, Any]], before: str, after: str) -> dict[str, dict[str, Any]]:
    """What became of each figure that lines of `results.jsonl` hold under the keys `before` and `after`.

    Pictures of one prompt are no independent ones, so each prompt counts once, as the mean of its pictures.

    Returns:
        figure -> `before` and `after` (those keys: means), `change`, `interval` ([low, high], 95%, over prompts; None
        where there is one prompt), and `worse`, the share of pictures of which the figure fell at all.
    """
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row["prompt"]].append(place)

    def by_prompt(values: np.ndarray) -> np.ndarray:
        return np.array([values[these].mean() for these in places.values()])

    found = {}
    for name in (name for name, value in rows[0][after].items() if not isinstance(value, str)):
        old, new = (np.array([row[side][name] for row in rows], dtype=float) for side in (before, after))
        differences = by_prompt(new - old)
        found[name] = {
            before: float(by_prompt(old).mean()),
            after: float(by_prompt(new).mean()),
            "change": float(differences.mean()),
            "interval": list(paired_interval([differences])[1:]) if len(differences) > 1 else None,
            "worse": float((new < old).mean()),
        }
    return found


def change_table(title: str, figures: Mapping[str, Mapping[str, Any]], before: str, after: str) -> Table:
    """What `changes` found, to be printed."""
    table = Table(title=title)
    for heading in ("", before, after, "change (95% interval)", "got worse"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in figures.items():
        ends = "" if one["interval"] is None else " ({:+.4f} .. {:+.4f})".format(*one["interval"])
        table.add_row(
            name, f"{one[before]:.4f}", f"{one[after]:.4f}", f"{one['change']:+.4f}{ends}", f"{one['worse']:.1%}"
        )
    if any(one["interval"] is None for one in figures.values()):
        table.caption = "no intervals: they are over prompts, and there is one"
    return table


def _whole_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: _whole_length(data)].decode("utf-8").splitlines()]


def _whole_length(data: bytes) -> int:
    return data.rfind(b"\n") + 1
