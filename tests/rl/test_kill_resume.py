"""A few kills by `tests/kill_resume.py`; `make kill` does 200."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_killed_runs_end_as_the_one_without_kills():
    command = [sys.executable, "tests/kill_resume.py", "--kills", "6", "--rollouts", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 kills in" in done.stdout
