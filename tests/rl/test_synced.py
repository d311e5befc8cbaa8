"""What has its name is on the disk: a power cut leaves neither half a checkpoint nor half a result."""

import os

import pytest

from rl.checkpoints import BESIDE, MARKER, publish, written_beside


@pytest.fixture(autouse=True)
def no_sync():
    """In place of the one of all other tests: here files are synced."""


def number(path):
    """What a file keeps when it is renamed."""
    return path.stat().st_ino


@pytest.fixture
def synced(monkeypatch, tmp_path):
    """(number, bytes, what files there are) at every sync of a file or folder, in order."""
    seen, fsync = [], os.fsync

    def noting(descriptor):
        found = os.fstat(descriptor)
        there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        seen.append((found.st_ino, found.st_size, there))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return seen


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, synced, again):
    """Its files and folders, and its marker behind them; last, when it stands there, the folder that says so."""
    beside, place = tmp_path / BESIDE, tmp_path / "checkpoint-4"
    if again:
        place.mkdir()
        (place / "of the one before").touch()
    for file in ("optimizer.pt", "scheduler/scheduler_config.json"):
        (beside / file).parent.mkdir(parents=True, exist_ok=True)
        (beside / file).write_text("12345")
    publish(beside, place, {"global_step": 4})
    *contents, marker, folder, parent = synced
    files = [place / "optimizer.pt", place / "scheduler/scheduler_config.json"]
    assert {found for found, *_ in contents} == {number(path) for path in (*files, place / "scheduler")}
    assert {(found, size) for found, size, _ in contents} >= {(number(file), 5) for file in files}
    assert marker[:2] == (number(place / MARKER), (place / MARKER).stat().st_size)
    assert folder[0] == number(place)
    assert not any("checkpoint-4/optimizer.pt" in there for *_, there in (*contents, marker, folder))
    assert parent[0] == number(tmp_path)
    assert "checkpoint-4/optimizer.pt" in parent[2]


def test_results_are_on_the_disk_before_they_have_their_names(tmp_path, synced):
    names = {"summary.json", "unet/config.json"}
    with written_beside(tmp_path) as beside:
        for name in names:
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_text("12345")
    assert {(found, size) for found, size, _ in synced} == {(number(tmp_path / name), 5) for name in names}
    assert not any(names & there for *_, there in synced)
