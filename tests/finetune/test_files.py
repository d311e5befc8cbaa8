"""Parts of a folder appear all or none."""

import os

import pytest

from finetune import files
from reward.whole_files import write_whole
from tests.finetune.select_case import files_of
from tests.rl.conftest import full_disk


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    write_whole(tmp_path / "a", b"before")
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*a: File too large; what was written before"):
        write_whole(tmp_path / "a", b"x" * 10_000)
    assert files_of(tmp_path) == {"a": b"before"}


def test_parts_are_replaced_all_or_none_and_what_else_is_there_stays(tmp_path, monkeypatch):
    folder, parts = tmp_path / "folder", ("report", "data", "chart")

    def write(content, *names, fail=False):
        with files.replaced_parts(folder, parts) as new:
            for name in names:
                (new / name).write_text(content)
            if fail:
                raise KeyboardInterrupt

    write("one", "report", "data", "chart")
    (folder / "mine").write_text("mine")
    before = files_of(folder)
    with pytest.raises(KeyboardInterrupt):
        write("two", "report", "data", fail=True)
    assert files_of(folder) == before
    replace = os.replace
    for failing in range(5):  # three parts go, two come
        left = [failing]

        def fails_once(source, target, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError("no room")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", fails_once)
            with pytest.raises(OSError, match="no room"):
                write("two", "report", "data")
        assert files_of(folder) == before
    write("two", "report", "data")
    assert files_of(folder) == {"report": b"two", "data": b"two", "mine": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_a_disk_of_its_own_is_written_on_that_disk(tmp_path):
    """And what a killed process left on it is no obstacle, and goes with the next one."""
    folder = tmp_path / "disk"
    (folder / "lost+found").mkdir(parents=True)
    (folder / ".disk.killed" / "new").mkdir(parents=True)
    (folder / ".pool.json.7.part").touch()
    assert not files.holds_files(folder)
    with files.replaced_parts(folder, ("data",)) as new:
        assert new.is_relative_to(folder)
        (new / "data").write_text("whole")
    assert files.holds_files(folder)
    assert (folder / "data").read_text() == "whole"
    assert not (folder / ".disk.killed" / "new").exists()
