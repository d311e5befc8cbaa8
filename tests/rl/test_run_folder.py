import json
import os
import shutil

import pytest

from rl.checkpoints import (
    BESIDE,
    MARKER,
    RUN_CONFIG,
    abandon_later,
    check_output_dir,
    claim_output_dir,
    complete_checkpoints,
    discard,
    is_complete,
    publish,
    resolve_checkpoint,
    rotate,
    written_beside,
)


def checkpoint(folder, step, complete=True):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    if complete:
        (place / MARKER).write_text("{}")
    return place


def claim(folder, config, overwrite=False, resume=False):
    check_output_dir(folder, config, overwrite=overwrite, resume=resume)
    claim_output_dir(folder, config, resume=resume)


def test_newest_whole_checkpoint_by_number_not_by_name(tmp_path):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, complete=False)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == [
        "checkpoint-2", "checkpoint-9", "checkpoint-10",
    ]  # fmt: skip
    for spelling in ("latest", "True", True):
        assert resolve_checkpoint(spelling, tmp_path).name == "checkpoint-10"
    assert resolve_checkpoint(None, tmp_path) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        resolve_checkpoint("latest", tmp_path / "empty")


def test_other_settings_are_refused_and_listed(tmp_path):
    claim(tmp_path, {"epsilon": 0.1, "seed": 1})
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match=r"epsilon: 0.1 -> 0.2.*--resume_from_checkpoint.*--overwrite_output_dir"):
        claim(tmp_path, {"epsilon": 0.2, "seed": 1})
    assert complete_checkpoints(tmp_path)
    claim(tmp_path, {"epsilon": 0.2, "seed": 1}, resume=True)
    assert complete_checkpoints(tmp_path)
    claim(tmp_path, {"epsilon": 0.3, "seed": 1}, overwrite=True)
    assert not complete_checkpoints(tmp_path)


@pytest.mark.parametrize("result", ["summary.json", "pytorch_lora_weights.safetensors"])
def test_same_settings_start_anew_only_if_nothing_is_lost(tmp_path, result):
    claim(tmp_path, {"seed": 1})
    claim(tmp_path, {"seed": 1, "resume_from_checkpoint": None})
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match=" unfinished run"):
        claim(tmp_path, {"seed": 1})
    (tmp_path / result).write_text("{}")
    with pytest.raises(ValueError, match=r" finished run of the same settings.*--overwrite_output_dir"):
        claim(tmp_path, {"seed": 1})
    assert (tmp_path / result).exists()
    claim(tmp_path, {"seed": 1}, overwrite=True)
    assert not (tmp_path / result).exists()
    assert not (tmp_path / "checkpoint-3").exists()


def test_checking_a_folder_touches_nothing(tmp_path):
    claim(tmp_path, {"seed": 1})
    kept = checkpoint(tmp_path, 3)
    check_output_dir(tmp_path, {"seed": 2}, overwrite=True, resume=False)
    assert is_complete(kept)
    assert json.loads((tmp_path / RUN_CONFIG).read_text()) == {"seed": 1}


def test_overwriting_what_is_resumed_is_refused(tmp_path):
    kept = checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match=r"overwrite_output_dir.*resume_from_checkpoint"):
        claim(tmp_path, {}, overwrite=True, resume=True)
    assert is_complete(kept)


def test_a_checkpoint_replaces_one_of_its_name_and_one_of_the_two_is_always_whole(tmp_path, monkeypatch):
    old, beside = checkpoint(tmp_path, 3), checkpoint(tmp_path / BESIDE, 3, complete=False)
    (old / "which").write_text("old")
    (beside / "which").write_text("new")
    whole, rename = [], os.replace

    def renaming(*paths):
        rename(*paths)
        whole.append(any(is_complete(path) for path in tmp_path.rglob("checkpoint-3*")))

    monkeypatch.setattr(os, "replace", renaming)
    publish(beside, old, {"global_step": 3})
    assert whole == [True, True]
    assert (old / "which").read_text() == "new"
    assert json.loads((old / MARKER).read_text()) == {"global_step": 3}
    assert {path.name for path in tmp_path.iterdir()} == {BESIDE, "checkpoint-3"}


@pytest.mark.parametrize("how", ["discard", "rotate", "publish", "clear"])
def test_a_checkpoint_that_is_half_deleted_is_not_whole(tmp_path, monkeypatch, how):
    """As if the process died where its files begin to be deleted."""
    claim(tmp_path, {"seed": 1})
    doomed = checkpoint(tmp_path, 3)
    if how == "publish":
        beside = checkpoint(tmp_path / BESIDE, 3, complete=False)
    if how == "rotate":
        checkpoint(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    if how == "discard":
        discard(doomed)
    elif how == "rotate":
        rotate(tmp_path, 1)
    elif how == "publish":
        publish(beside, doomed, {"global_step": 3})
        assert is_complete(doomed)
        doomed = tmp_path / "checkpoint-3.replaced"
    else:
        claim(tmp_path, {"seed": 1}, overwrite=True)
    assert doomed.is_dir()
    assert not is_complete(doomed)


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    for step in (3, 11):
        checkpoint(tmp_path, step, complete=False)
    rotate(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2)
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10", "checkpoint-11"}


def test_rotation_keeps_the_best_one(tmp_path):
    for step in (2, 9, 10, 11):
        checkpoint(tmp_path, step)
    rotate(tmp_path, 1, best=tmp_path / "checkpoint-9")
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-11"}
    rotate(tmp_path, 2, best=tmp_path / "checkpoint-11")
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-11"}
    rotate(tmp_path, 1, best=tmp_path / "checkpoint-11")
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-11"}


def test_checkpoints_of_the_branch_left_behind_are_neither_latest_nor_rotated_for(tmp_path, caplog):
    for step in (4, 6, 8):
        checkpoint(tmp_path, step)
    abandon_later(4, tmp_path)
    assert resolve_checkpoint("latest", tmp_path).name == "checkpoint-4"
    assert "checkpoint-8.abandoned" in caplog.text
    assert resolve_checkpoint(str(tmp_path / "checkpoint-8.abandoned"), tmp_path)  # nothing is lost
    checkpoint(tmp_path, 5)
    rotate(tmp_path, 2)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]


def test_files_arrive_together_or_not_at_all(tmp_path):
    def half():
        with written_beside(tmp_path) as beside:
            (beside / "a").write_text("new")
            raise OSError("full")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"):
        half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
    with written_beside(tmp_path) as beside:
        (beside / "a").write_text("new")
        (beside / "folder").mkdir()
        (beside / "folder" / "b").write_text("new")
    assert (tmp_path / "a").read_text() == (tmp_path / "folder/b").read_text() == "new"
    assert not (tmp_path / BESIDE).exists()


def test_files_of_others_are_never_deleted(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").write_text("keep")
    (tmp_path / "notes.txt").write_text("keep")
    claim(tmp_path, {"seed": 1}, overwrite=True)
    assert (tmp_path / "runs/mine").exists()
    claim(tmp_path, {"seed": 2}, overwrite=True)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / RUN_CONFIG).exists()


def test_checkpoints_without_a_config_are_somebody_elses(tmp_path):
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="checkpoints of another run"):
        claim(tmp_path, {"seed": 1})


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        claim(tmp_path / "file", {})
