"""Kills by `tests/kill_resume.py`; `make kill` does 200."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kills", "behind", "flags"),
    [
        (18, 5, "--rollouts 4"),
        (3, 3, "--rollouts 4 --ranks 2 --engine zero2 --phases rollout update checkpoint --no-again"),
    ],
    ids=["one rank", "two ranks of ZeRO-2"],
)
def test_killed_runs_end_as_the_one_without_kills(kills, behind, flags):
    """So many of the kills fall where there is something to go on from, at the least. Under torchrun, where every start
    takes ten seconds, a finished run is not started again."""
    command = [sys.executable, "tests/kill_resume.py", "--kills", str(kills), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{kills} kills in" in done.stdout
    assert int(re.search(r"(\d+) of them when there was a checkpoint", done.stdout)[1]) >= behind
