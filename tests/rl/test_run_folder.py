import json
import os
import shutil

import pytest

from reward.checkpoint_folders import abandon_later, discard
from rl.checkpoints import (
    BEFORE,
    BESIDE,
    FINISHED,
    MARKER,
    RUN_CONFIG,
    Start,
    check_output_dir,
    check_writable,
    claim_output_dir,
    complete_checkpoints,
    forget_before,
    is_complete,
    mark_finished,
    plan_start,
    publish,
    resolve_checkpoint,
    restore_before,
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


def test_a_checkpoint_that_was_moved_aside_for_one_that_never_came_is_found_again(tmp_path, monkeypatch):
    """As if the process died between the two renames."""
    old, beside = checkpoint(tmp_path, 3), checkpoint(tmp_path / BESIDE, 3, complete=False)
    rename = os.replace

    def renaming(source, place):
        if source == beside:
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr(os, "replace", renaming)
    with pytest.raises(KeyboardInterrupt):
        publish(beside, old, {"global_step": 3})
    assert not old.exists()
    assert resolve_checkpoint("auto", tmp_path) == old
    assert is_complete(old)


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
        discard(doomed, MARKER)
    elif how == "rotate":
        rotate(tmp_path, 1)
    elif how == "publish":
        publish(beside, doomed, {"global_step": 3})
        assert is_complete(doomed)
        doomed = tmp_path / "checkpoint-3.replaced"
    else:
        claim(tmp_path, {"seed": 1}, overwrite=True)
        assert not complete_checkpoints(tmp_path)
        return
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
    abandon_later(4, tmp_path, MARKER)
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
    (tmp_path / "notes.txt").write_text("keep")
    claim(tmp_path, {"seed": 1}, overwrite=True)
    claim(tmp_path, {"seed": 2}, overwrite=True)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / RUN_CONFIG).exists()


@pytest.mark.parametrize("name", ["unet", "scheduler", "samples", "README.md"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_runs_and_holds_what_runs_write_is_refused(tmp_path, name, overwrite):
    """Such as the base model's own."""
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"is no run's, but holds {name}, which a run would write over"):
        claim(tmp_path, {"seed": 1}, overwrite=overwrite)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_overwritten_comes_back_until_it_is_forgotten(tmp_path):
    claim(tmp_path, {"seed": 1})
    checkpoint(tmp_path, 3)
    (tmp_path / "runs").mkdir()
    for name in ("runs/events", "summary.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    before = everything(tmp_path)
    for _ in range(2):  # the second time the first attempt's remains are there too, as after a kill
        claim(tmp_path, {"seed": 2}, overwrite=True)
        assert not complete_checkpoints(tmp_path)
        assert json.loads((tmp_path / RUN_CONFIG).read_text()) == {"seed": 2}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/others").write_text("new")
    restore_before(tmp_path)
    assert everything(tmp_path) == before
    claim(tmp_path, {"seed": 2}, overwrite=True)
    forget_before(tmp_path)
    restore_before(tmp_path)
    assert everything(tmp_path).keys() == {RUN_CONFIG, "notes.txt"}


def test_a_whole_unet_without_anything_else_comes_back_too(tmp_path):
    claim(tmp_path, {"seed": 1})
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/weights").write_text("old")
    before = everything(tmp_path)
    claim(tmp_path, {"seed": 2}, overwrite=True)
    restore_before(tmp_path)
    assert everything(tmp_path) == before


def test_a_run_that_goes_on_in_vain_leaves_its_settings_as_they_were(tmp_path):
    claim(tmp_path, {"seed": 1})
    checkpoint(tmp_path, 3)
    mark_finished(tmp_path, 3)
    before = everything(tmp_path)
    claim(tmp_path, {"seed": 1, "lora_rank": 4}, resume=True)
    assert not (tmp_path / FINISHED).exists()
    restore_before(tmp_path)
    assert everything(tmp_path) == before
    claim(tmp_path, {"seed": 1, "num_train_epochs": 9}, resume=True)
    mark_finished(tmp_path, 9)
    assert everything(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("content", ["{", "[1]", "5"])
def test_settings_of_a_run_that_cannot_be_read_are_settings_that_differ(tmp_path, content):
    (tmp_path / RUN_CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"holds a run of other settings .run_config.json cannot be read"):
        claim(tmp_path, {"seed": 1})
    claim(tmp_path, {"seed": 1}, overwrite=True)
    assert json.loads((tmp_path / RUN_CONFIG).read_text()) == {"seed": 1}


def test_checkpoints_without_a_config_are_somebody_elses(tmp_path):
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="checkpoints of another run"):
        claim(tmp_path, {"seed": 1})


def test_output_dir_that_is_a_link_to_nothing(tmp_path):
    """As to a disk that is not there; said before anything is loaded."""
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match=f"is a link to {tmp_path}/disk, which is not there; make that folder"):
        claim(tmp_path / "link", {})


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        claim(tmp_path / "file", {})


def test_auto_starts_goes_on_and_stops_with_the_same_command(tmp_path):
    folder = tmp_path / "run"
    assert plan_start("auto", folder, {"seed": 1}, False) == Start(None, keep=False)
    assert not folder.exists()
    claim_output_dir(folder, {"seed": 1}, resume=False)  # killed here, and again while its first checkpoint is written
    checkpoint(folder / BESIDE, 1)
    checkpoint(folder, 2, complete=False)
    (folder / "pytorch_lora_weights.safetensors").write_text("")
    assert plan_start("auto", folder, {"seed": 1}, False) == Start(None, keep=False)
    claim_output_dir(folder, {"seed": 1}, resume=False)
    assert {path.name for path in folder.iterdir()} == {RUN_CONFIG, BEFORE}
    for step in (3, 4):
        checkpoint(folder, step)
    assert plan_start("AUTO", folder, {"seed": 1}, False) == Start(folder / "checkpoint-4", keep=True)
    mark_finished(folder, 4)
    assert plan_start("auto", folder, {"seed": 1}, False).finished
    claim_output_dir(folder, {"seed": 1, "num_train_epochs": 9}, resume=True)  # goes on to more rollouts
    assert not (folder / FINISHED).exists()


def test_auto_takes_up_no_run_of_other_settings(tmp_path):
    claim(tmp_path, {"seed": 1})
    for overwrite, message in ((False, "seed: 1 -> 2.*--resume_from_checkpoint latest"), (True, "give one of them")):
        with pytest.raises(ValueError, match=message):
            plan_start("auto", tmp_path, {"seed": 2}, overwrite)
    (tmp_path / RUN_CONFIG).unlink()
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="checkpoints of another run"):
        plan_start("auto", tmp_path, {"seed": 2}, False)


def test_a_checkpoint_elsewhere_is_compared_with_its_own_settings_and_never_mixed_with_others(tmp_path, caplog):
    there, here = tmp_path / "there", tmp_path / "here"
    claim(there, {"seed": 1, "epsilon": 0.1})
    origin = checkpoint(there, 3)
    now = {"seed": 2, "epsilon": 0.1}
    assert plan_start(str(origin), here, now, False) == Start(origin, keep=True)
    assert "seed: 1 -> 2" in caplog.text
    claim_output_dir(here, now, resume=True)
    checkpoint(here, 5)
    assert plan_start(str(origin), here, now, False) == Start(origin, keep=True)  # killed, and started again
    with pytest.raises(ValueError, match="seed: 2 -> 3"):
        plan_start(str(origin), here, {"seed": 3, "epsilon": 0.1}, False)
    assert plan_start(str(origin), here, {"seed": 3, "epsilon": 0.1}, True) == Start(origin, keep=False)
    with pytest.raises(ValueError, match="give one of them"):
        plan_start(str(origin), there, now, True)
    assert is_complete(origin)


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path, monkeypatch):
    kept = checkpoint(tmp_path, 3)
    check_writable(tmp_path / "not/yet/there")
    assert list(tmp_path.iterdir()) == [kept]
    with pytest.raises(ValueError, match=r"cannot write to output_dir /proc/run \(/proc: .*give another --output_dir"):
        plan_start(None, "/proc/run", {}, False)  # there not even root can
    assert plan_start(None, "/proc/run", {}, False, thorough=False) == Start(None, keep=False)

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ValueError, match=rf"Permission denied\).*; the newest whole checkpoint is {kept}"):
        check_writable(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_found_at_the_start(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path)
    tmp_path.chmod(0o700)
