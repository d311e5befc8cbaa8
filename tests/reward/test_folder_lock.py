"""A second run in a folder that another one writes to; other runs are other processes here, as they are for users."""

import errno
import fcntl
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reward.folder_lock import FolderInUseError, check_free, held, taken

HOLD = """
import sys
from reward.folder_lock import held

with held(sys.argv[1], sys.argv[2] == "first", lambda: None):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process of the other run, and waits until it holds the lock."""
    started = []

    def start(rank):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), rank]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes))
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_whose_first_process_was_killed_still_has_its_folder(holder, tmp_path):
    first, second = holder("first"), holder("other")
    with pytest.raises(
        FolderInUseError, match=rf"in use by another run \(its processes: {first.pid} on .*{second.pid}"
    ):
        check_free(tmp_path / "run")
    first.kill()
    first.wait()
    for start in (lambda: check_free(tmp_path / "run"), lambda: taken(tmp_path / "run").__enter__()):
        with pytest.raises(FolderInUseError, match="wait for it, end it, or give another --output_dir"):
            start()
    second.kill()
    second.wait()
    check_free(tmp_path / "run")
    with taken(tmp_path / "run"):
        assert len(re.findall("on", (tmp_path / "run/.lock").read_text())) == 1


def test_what_ends_gives_the_folder_back(tmp_path):
    with taken(tmp_path) as lock, pytest.raises(FolderInUseError):
        check_free(tmp_path)
    assert lock.closed
    with held(tmp_path, True, lambda: None), held(tmp_path, False, lambda: None), pytest.raises(FolderInUseError):
        check_free(tmp_path)
    check_free(tmp_path)


def test_a_free_folder_stays_as_it_is(tmp_path):
    check_free(tmp_path / "nowhere")
    check_free(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path):
    with (
        pytest.raises(ValueError, match="several machines need one on a disk that all of them see"),
        held(tmp_path, False, lambda: None),
    ):
        pass


def test_a_disk_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with taken(tmp_path):
        assert "knows no locks" in caplog.text
