"""The one language of all benchmarks: their flags, their rows, their table and their JSON."""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        value, low, high: the figure and its 95% interval; low and high None where there is none.
        n: what it was measured on, a number of pictures, prompts or runs.
        goal: such as ">= 1.5", or None. A goal that begins with "low" or "high" is about the interval: "low > 0".
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    goal: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        *which, sign, bound = self.goal.split()
        figure = getattr(self, which[0]) if which else self.value
        assert figure is not None, f"{self.name}: goal {self.goal!r} is about an interval that is not there"
        limit = float(bound)
        return {">=": figure >= limit, "<=": figure <= limit, ">": figure > limit, "<": figure < limit}[sign]


def flags(description: str, seeds: int | None = 3) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; no `--seeds` (None) where there is nothing to repeat."""
    # Some benchmarks hand on what they do not know: `--seed` must not be taken for `--seeds`.
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="at most 3 minutes on 2 cores; its figures prove nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"number of seeds (default {seeds})")
    return parser


def over_seeds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over seeds and Student's 95% interval, which needs two of them."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return mean, mean - half, mean + half


def publish(rows: list[Row], began: float, json_file: Path | None, quick: bool, shown: bool = True) -> None:
    """Print the table, if it is to be `shown`, and write the JSON; `began` is `time.perf_counter()` at the start."""
    if shown:
        _show(rows, quick)
    if json_file:
        vectors = torch.backends.cpu.get_cpu_capability()  # what a CPU's speed depends on most: AVX512, AVX2, ...
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "seconds": round(time.perf_counter() - began, 1),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {vectors}, {platform.system()}, quick={quick}",
            "rows": [_as_json(row) for row in rows],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        beside = json_file.with_name(json_file.name + ".part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(json_file)


def _as_json(row: Row) -> dict[str, object]:
    """JSON knows no infinity: an end of an interval that is none is null there."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (asdict(row) | {"holds": row.holds}).items()
    }


def _show(rows: list[Row], quick: bool) -> None:
    table = Table(title="a quick run: these figures prove nothing" if quick else None)
    for column in ("", "value", "95% interval", "n", "goal", "holds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        interval = "" if row.low is None else f"{row.low:.4g} .. {row.high:.4g}"
        holds = {None: "", True: "yes", False: "NO"}[row.holds]
        table.add_row(row.name, f"{row.value:.4g}", interval, str(row.n or ""), row.goal or "", holds)
    Console().print(table)
