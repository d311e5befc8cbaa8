"""From which checkpoints runs go on, and what such a run is then: the one that was never interrupted."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rl.adapter import LORA_WEIGHTS
from rl.watch_limits import MONITORS
from tests.rl.conftest import args_of, trainer_of
from tests.rl.outcomes import assert_resumes_to_the_bit, logged


def test_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    whole, rest = assert_resumes_to_the_bit(make_trainer, tmp_path)
    assert logged(whole, "reward") == logged(rest, "reward")
    assert logged(whole, "watch/drawn") == logged(rest, "watch/drawn") != []


def test_resumed_run_with_two_passes_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    assert_resumes_to_the_bit(make_trainer, tmp_path, num_iterations=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def trained_once(pipeline_folder, tmp_path_factory):
    """The folder of a run of one rollout; for `one_rollout`, which hands out copies."""
    folder = tmp_path_factory.mktemp("one_rollout") / "run"
    trainer_of(pipeline_folder, args_of(folder, num_train_epochs=1)).train()
    return folder


@pytest.fixture
def one_rollout(trained_once, tmp_path):
    """In the folder where `make_trainer`'s runs are, one of one rollout."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def test_resumed_run_trains_the_steps_that_it_is_told_to(make_trainer, one_rollout):
    changes = {"num_inference_steps": 4, "train_steps": ["1", "2"], "gradient_accumulation_steps": 4}
    rest = make_trainer(num_train_epochs=2, **changes)
    rest.train(resume_from_checkpoint="latest")
    assert rest.train_steps == (1, 2)
    assert rest.experience.trajectory.steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation_steps": 2}, {"num_iterations": 2}, {"generation_batch_size": 16}]
)
def test_resuming_with_other_rollouts_is_refused(make_trainer, one_rollout, changes):
    with pytest.raises(ValueError, match=r"1 updates in 1 rollouts.*a rollout has 2 updates.*num_iterations"):
        make_trainer(**changes).train(resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": "sgd"}, "holds the state of the optimizer adamw_torch.*, but optim is sgd"),
        ({"ema_decay": 0.9}, "ema_decay is 0.9, but .*checkpoint-1 was made without it"),
        ({"lora_rank": 5}, "lora_rank is 5, but the LoRA in .*checkpoint-1 has the rank 2"),
        (
            {
                "train_steps": ["auto:2"],
                "num_inference_steps": 5,
                "gradient_accumulation_steps": 8,
                "generation_batch_size": 16,
                "num_generations": 2,
            },
            "train_steps is auto:2, but .*checkpoint-1 was made by training those it was told; .*name the steps",
        ),
        ({"tune": "full"}, "tune is full, but .*checkpoint-1 holds no folder unet"),
    ],
)
def test_resuming_with_what_the_checkpoint_lacks_is_refused(make_trainer, one_rollout, changes, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(num_train_epochs=2, **changes).train(resume_from_checkpoint="latest")


def test_resumed_run_saves_and_logs_as_often_as_it_says_itself(make_trainer):
    settings = {"save_strategy": "steps", "save_total_limit": None}
    make_trainer(num_train_epochs=2, save_steps=1, **settings).train()
    rest = make_trainer(num_train_epochs=6, save_steps=3, logging_steps=2, **settings)
    rest.train(resume_from_checkpoint="latest")
    folders = sorted(name for name in os.listdir(rest.args.output_dir) if name != "runs")
    assert folders == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert [entry["step"] for entry in rest.state.log_history if "loss" in entry] == [1, 2, 4, 6]


def test_a_run_killed_between_its_last_checkpoint_and_the_clearing_up_is_cleared_up(make_trainer, monkeypatch):
    """What stays is the last one and the best, the last that a rollout was drawn from."""
    settings = {"num_train_epochs": 3, "save_total_limit": 1, "watch_limits": dict.fromkeys(MONITORS)}
    with monkeypatch.context() as killed:
        killed.setattr("rl.resumable.rotate", lambda *_: None)
        make_trainer(**settings).train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint="latest")
    kept = {path.name for path in Path(again.args.output_dir).glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3"}


def test_resuming_from_an_earlier_checkpoint_leaves_the_later_ones_behind(make_trainer, tmp_path):
    trainer = make_trainer(num_train_epochs=3, save_total_limit=None)
    trainer.train()
    again = make_trainer(num_train_epochs=2, save_total_limit=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert {name for name in os.listdir(tmp_path / "run") if name != "runs"} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-2.abandoned", "checkpoint-3.abandoned",
    }  # fmt: skip


def test_checkpoint_is_a_lora_folder_without_the_base(trained_once):
    files = sorted(os.listdir(trained_once / "checkpoint-1"))
    assert files == [
        "complete.json", "optimizer.pt", LORA_WEIGHTS, "rng_state.pth", "run_state.json", "scheduler", "scheduler.pt",
        "trainer_state.json",
    ]  # fmt: skip


def test_checkpoint_that_was_not_completed_is_not_resumed(make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    last = f"{trainer.args.output_dir}/checkpoint-2"
    os.remove(f"{last}/complete.json")
    with pytest.raises(ValueError, match=r"was not completely written.*newest whole checkpoint is .*checkpoint-1"):
        make_trainer().train(resume_from_checkpoint=last)
    resumed = make_trainer(num_train_epochs=2)
    resumed.train(resume_from_checkpoint="latest")
    assert len(logged(resumed, "reward")) == 2
    with pytest.raises(ValueError, match="there is no folder"):
        make_trainer().train(resume_from_checkpoint="nowhere")


def test_damaged_checkpoint_is_not_resumed(make_trainer, tmp_path):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    file = tmp_path / "run/checkpoint-2/optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: optimizer.pt .*newest good .*checkpoint-1"):
        make_trainer(num_train_epochs=2).train(resume_from_checkpoint="latest")


def test_resuming_under_another_engine_is_refused(make_trainer, one_rollout):
    """The Trainer would take up no optimizer, and say nothing."""
    file = one_rollout / "checkpoint-1/complete.json"
    marker = json.loads(file.read_text())
    del marker["files"], marker["seal"]
    file.write_text(json.dumps(marker | {"engine": "DeepSpeed's ZeRO-2 on 2 processes"}))
    with pytest.raises(ValueError, match="as DeepSpeed's ZeRO-2 on 2 processes leaves it, but this run has torch"):
        make_trainer().train(resume_from_checkpoint="latest")
