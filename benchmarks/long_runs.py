"""What benchmarks that take hours have in common: where results are kept and what of, how long they may take."""

import hashlib
import json
import os
import time
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tinyworld" / "assets"
TRAINED_WITH = ("sd", "rahf", "prompts_*.txt")
"""What of the assets a training's outcome depends on; their cards (README.md) are for people."""


def add_flags(parser: ArgumentParser, work: str) -> None:
    """What every benchmark of trainings takes.

    Args:
        work: the folder where they are kept; those of a quick one, which prove nothing, lie in `outputs`.
    """
    parser.add_argument("--work", type=Path, help=f"folder of the finished trainings (default {work})")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings beside each other, a thread each")
    parser.add_argument(
        "--budget_minutes", type=float, metavar="M", help="start no training that would end later than in M minutes"
    )
    parser.set_defaults(default_work=Path(work))


def work_folder(options: Namespace) -> Path:
    default = Path("outputs") / f"{options.default_work.name}_quick" if options.quick else options.default_work
    return options.work or default


class Budget:
    """Minutes from now on, None for any number."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest = 0.0

    def allows_another(self) -> bool:
        """Whether one more training, as long as the longest so far, would end in time."""
        return self.end is None or time.monotonic() + self._longest <= self.end

    def note(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)


def digest(*what: Any) -> str:
    """Eight digits that differ where anything differs that a result comes of.

    Args:
        what: JSON can hold it.
    """
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=4).hexdigest()


@cache
def assets_digest() -> str:
    """Of the small world's generator, predictor and prompts: with others, nothing that was trained is the same."""
    found = [path for pattern in TRAINED_WITH for path in sorted(ASSETS.glob(pattern))]
    inside = [file for path in found for file in (path, *sorted(path.rglob("*"))) if file.name != "README.md"]
    files = [file for file in inside if file.is_file()]
    contents = [[str(file.relative_to(ASSETS)), hashlib.blake2b(file.read_bytes()).hexdigest()] for file in files]
    return digest(contents)


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    beside.replace(file)
