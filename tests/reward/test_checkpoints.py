"""Which checkpoint a training goes on from, and what is refused because it would not be the same training."""

import json
import shutil

import pytest
from transformers import Trainer

from reward import checkpoint_folders, train
from reward.checkpoints import checkpoint_to_resume, is_whole, mark_whole, rotate
from reward.train_config import RahfTrainingArguments
from reward.trainer import DivergedError, RahfTrainer


def names_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def make(folder, *steps, whole=True):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            mark_whole(folder / f"checkpoint-{step}", {})


def last_step(out):
    return json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize("word", ["last", "latest", "auto", "true"])
def test_a_torn_checkpoint_is_passed_over(word, tmp_path):
    make(tmp_path, 2, 10)
    make(tmp_path, 12, whole=False)
    assert checkpoint_to_resume(word, tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-12"), tmp_path)


@pytest.mark.parametrize("word", ["latest", "auto"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.5}, "learning_rate: .* -> 0.5"),
        (
            {"heatmap_positive_weight": 3, "seed": 7},
            "heatmap_positive_weight: 1.0 -> 3.0; .*seed: 42 -> 7|seed: 42 -> 7",
        ),
        ({"crop_probability": 0.5}, "crop_probability: 0.0 -> 0.5"),
        ({"image_size": 24}, r"image_size: None -> \[24\]"),
        ({"per_device_train_batch_size": 2}, "pictures an update: .* -> "),
    ],
    ids=str,
)
def test_a_training_of_other_settings_does_not_go_on(command, raw_data, word, changed, said):
    """Trainer would load what is there, and keep its rates and moments whatever it is told."""
    train.main(command("out", max_steps=2))
    before = names_in(raw_data / "out")
    with pytest.raises(ValueError, match=said) as refused:
        train.main(command("out", resume_from_checkpoint=word, **changed))
    assert "was made with other settings" in str(refused.value)
    assert "begin anew from its weights, --model" in str(refused.value)
    assert names_in(raw_data / "out") == before


def test_a_training_goes_on_for_longer_in_other_micro_batches_and_from_elsewhere(command, raw_data, data):
    whole = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
    train.main(command("out", max_steps=2, **whole))
    moved = raw_data / "moved"
    shutil.copytree(data, moved)
    halves = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    train.main(command("out", max_steps=4, resume_from_checkpoint="latest", data=moved, **halves))
    assert last_step(raw_data / "out") == 4


def test_markers_that_say_nothing_are_taken(command, raw_data):
    train.main(command("out", max_steps=2))
    (raw_data / "out" / "checkpoint-2" / "complete").write_text("")
    train.main(command("out", resume_from_checkpoint="latest", learning_rate=1e-4, max_steps=4))
    assert last_step(raw_data / "out") == 4


def test_another_engine_does_not_go_on_without_the_optimizer(command, raw_data):
    train.main(command("out", max_steps=2))
    marker = raw_data / "out" / "checkpoint-2" / "complete"
    assert json.loads(marker.read_text())["engine"] == "torch"
    marker.write_text(marker.read_text().replace('"torch"', '"DeepSpeed\'s ZeRO-2 on 8 processes"'))
    with pytest.raises(ValueError, match=r"engine: .DeepSpeed's ZeRO-2 on 8 processes. -> 'torch'"):
        train.main(command("out", resume_from_checkpoint="latest"))


def test_another_branch_neither_is_the_newest_nor_is_written_into(command, raw_data):
    out = raw_data / "out"
    train.main(command("out", save_steps=1, eval_steps=1, save_total_limit=9, max_steps=3))
    how = {"save_steps": 1, "eval_steps": 1, "save_total_limit": 9}
    train.main(command("out", resume_from_checkpoint=out / "checkpoint-1", max_steps=2, **how))
    assert names_in(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-2.abandoned", "checkpoint-3.abandoned"]
    assert checkpoint_to_resume("latest", out) == out / "checkpoint-2"
    train.main(command("elsewhere", max_steps=2))
    with pytest.raises(ValueError, match="is not empty"):  # nor is another training's folder
        train.main(command("elsewhere", resume_from_checkpoint=out / "checkpoint-1", max_steps=2, **how))
    train.main(command("out", overwrite_output_dir=True, max_steps=2))
    assert names_in(out) == ["checkpoint-2"]


def test_the_oldest_go_but_for_the_best(tmp_path):
    make(tmp_path, 1, 2, 3, 4)
    rotate(tmp_path, 0, None)
    rotate(tmp_path, None, None)
    assert len(names_in(tmp_path)) == 4
    rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, 1, tmp_path / "checkpoint-1")
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, 1, None)
    assert names_in(tmp_path) == ["checkpoint-4"]


def test_killed_while_an_old_one_is_deleted_the_new_one_is_whole(command, raw_data, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    out, how = raw_data / "out", {"save_total_limit": 1, "load_best_model_at_end": False}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folders.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(command("out", **how))
    assert [is_whole(out / f"checkpoint-{step}") for step in (2, 4)] == [False, True]
    assert checkpoint_to_resume("latest", out) == out / "checkpoint-4"


def test_killed_while_one_is_written_again_it_is_not_whole(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    make(out, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            RahfTrainer._save_checkpoint(saved_at(out, 2), None, None)
    assert not is_whole(out / "checkpoint-2")


def saved_at(out, step):
    """As much of a trainer as saving asks for before anything is written."""

    class Waiting(RahfTrainer):
        def __init__(self):
            self.args = RahfTrainingArguments(output_dir=str(out), use_cpu=True)
            self.state = type("State", (), {"global_step": step})
            self.accelerator = type("Accelerator", (), {"wait_for_everyone": staticmethod(lambda: None)})

        def _get_output_dir(self, trial):
            return str(out)

    return Waiting()


def test_a_loss_that_is_no_number_ends_the_training(command, raw_data):
    """Trainer would leave it out of its own `loss`, and train on."""
    worse = {"learning_rate": 1e30, "max_grad_norm": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
    with pytest.raises(DivergedError, match=r"diverged: at update \d+ the loss is NaN or infinite \(score_loss"):
        train.main(command("other", **worse, eval_strategy="no", save_strategy="no", load_best_model_at_end=False))
