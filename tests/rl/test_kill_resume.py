"""Kills by `tests/kill_resume.py`; `make kill` does 200."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kills", "flags"),
    [(19, ["--rollouts", "4"]), (1, ["--rollouts", "2", "--ranks", "2", "--engine", "zero2"])],
    ids=["one rank", "two ranks of ZeRO-2"],
)
def test_killed_runs_end_as_the_one_without_kills(kills, flags):
    command = [sys.executable, "tests/kill_resume.py", "--kills", str(kills), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{kills} kills in" in done.stdout
