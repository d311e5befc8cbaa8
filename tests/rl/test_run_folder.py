import pytest

from rl.checkpoints import MARKER, RUN_CONFIG, claim_output_dir, complete_checkpoints, resolve_checkpoint


def checkpoint(folder, step, complete=True):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    if complete:
        (place / MARKER).write_text("{}")
    return place


def claim(folder, config, overwrite=False, resume=False):
    claim_output_dir(folder, config, overwrite=overwrite, resume=resume)


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
    with pytest.raises(ValueError, match="holds no whole one"):
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


def test_same_settings_start_anew_only_if_nothing_is_lost(tmp_path):
    claim(tmp_path, {"seed": 1})
    claim(tmp_path, {"seed": 1, "resume_from_checkpoint": None})
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="unfinished run"):
        claim(tmp_path, {"seed": 1})
    (tmp_path / "summary.json").write_text("{}")
    claim(tmp_path, {"seed": 1})
    assert not (tmp_path / "summary.json").exists()


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
