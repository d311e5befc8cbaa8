"""Runs that end before their time: full disks, policies that diverge, Ctrl-C."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from rl.adapter import LORA_WEIGHTS
from rl.interrupt import RunInterrupted
from rl.resumable import StopAtBoundaryError
from rl.rollout import DivergedError
from rl.scoring import RewardError
from tests.rl.conftest import full_disk
from tests.rl.outcomes import assert_same, lora
from tests.rl.toy_rewards import Redness


@pytest.mark.parametrize("writer", ["safetensors", "torch.save"])
def test_full_disk_leaves_the_previous_checkpoint_whole(make_trainer, monkeypatch, writer):
    """No file may grow beyond a few bytes while the second checkpoint is written: what a full disk looks like."""
    trainer = make_trainer(num_train_epochs=3)
    owner, name = (
        (trainer.policy, "save_adapter") if writer == "safetensors" else (trainer, "_save_optimizer_and_scheduler")
    )
    save = getattr(owner, name)

    def with_a_full_disk(*args):
        if trainer.state.global_step < 2:
            return save(*args)
        with full_disk():
            return save(*args)

    monkeypatch.setattr(owner, name, with_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*checkpoint-2: .*whole .* is .*checkpoint-1"):
        trainer.train()
    assert sorted(name for name in os.listdir(trainer.args.output_dir) if name != "runs") == ["checkpoint-1"]
    resumed = make_trainer(num_train_epochs=3)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.state.global_step == 3


def test_what_is_offered_where_the_disk_is_full_is_good_to_the_last_byte(make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    weights = Path(trainer.args.output_dir, "checkpoint-2", LORA_WEIGHTS)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with full_disk(), pytest.raises(OSError, match=r"cannot write the LoRA to .*whole checkpoint is .*checkpoint-1"):
        trainer.save_model()


def test_full_disk_leaves_the_final_lora_as_it_was(make_trainer):
    trainer = make_trainer(num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    before = lora(trainer.args.output_dir)
    for parameter in trainer.model.parameters():
        parameter.data += 1
    with full_disk(), pytest.raises(OSError, match=r"cannot write the LoRA to .*whole checkpoint is .*checkpoint-1"):
        trainer.save_model()
    assert_same(before, lora(trainer.args.output_dir))
    assert not os.path.exists(f"{trainer.args.output_dir}/.incomplete")


class Poison(TrainerCallback):
    """Does something to the policy's trainable parameters at an event behind the first update."""

    def __init__(self, event, act):
        def poison(args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        act(parameter)

        setattr(self, event, poison)


def becomes_nan(parameter):
    parameter.data.fill_(float("nan"))


def gets_nan_gradients(parameter):
    parameter.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("event", "act", "message"),
    [
        ("on_epoch_begin", becomes_nan, "in rollout 1 its latents are not finite for the prompt '"),
        ("on_step_begin", becomes_nan, "in update 2 the loss is nan"),
        ("on_step_begin", gets_nan_gradients, "in update 2 the norm of the gradient is nan"),
    ],
)
def test_policy_that_diverges_stops_the_run_and_keeps_the_last_checkpoint(make_trainer, event, act, message):
    trainer = make_trainer(num_train_epochs=3)
    trainer.add_callback(Poison(event, act))
    with pytest.raises(DivergedError, match=f"policy diverged: {message}"):
        trainer.train()
    assert [name for name in os.listdir(trainer.args.output_dir) if name != "runs"] == ["checkpoint-1"]
    assert os.path.isfile(f"{trainer.args.output_dir}/checkpoint-1/complete.json")


def test_weights_that_are_not_finite_are_not_saved(make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.add_callback(Poison("on_epoch_end", becomes_nan))
    with pytest.raises(DivergedError, match=r"after update 1 its weights are not finite.*holds no whole checkpoint"):
        trainer.train()


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(make_trainer):
    trainer = make_trainer(Redness(nan_after=3), num_train_epochs=4)
    with pytest.raises(RewardError, match=r"term `red` is nan for the prompt '"):
        trainer.train()
    assert os.path.isfile(f"{trainer.args.output_dir}/checkpoint-1/complete.json")


@pytest.mark.parametrize("updates", [1, 4])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(make_trainer, tmp_path, updates):
    """Asked for in the second rollout: the state is that of its start, or, if updates were made in it, of its end."""

    class Interrupting(Redness):
        def __call__(self, images, prompts):
            reward = super().__call__(images, prompts)
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return reward

    settings = {"gradient_accumulation_steps": 4 // updates, "num_train_epochs": 3, "save_strategy": "no"}
    trainer = make_trainer(Interrupting(), output_dir=str(tmp_path / "stopped"), **settings)
    with pytest.raises(RunInterrupted, match=rf"--resume_from_checkpoint .*checkpoint-{updates}"):
        trainer.train()
    settings["save_strategy"] = "epoch"
    resumed = make_trainer(output_dir=str(tmp_path / "stopped"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"stopped/checkpoint-{updates}"))
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    last = f"checkpoint-{3 * updates}"
    assert_same(lora(tmp_path / "stopped" / last), lora(tmp_path / "whole" / last))


class InterruptsInUpdate(TrainerCallback):
    """Ctrl-C in the update behind `step` others, when its micro-batches are drawn."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("save_strategy", ["no", "epoch"])
def test_ctrl_c_in_the_last_update_is_not_swallowed(make_trainer, save_strategy):
    trainer = make_trainer(num_train_epochs=2, save_strategy=save_strategy)
    trainer.add_callback(InterruptsInUpdate(1))
    with pytest.raises(RunInterrupted, match=r"stopped after 2 of 2 updates.*checkpoint-2"):
        trainer.train()
    resumed = make_trainer(num_train_epochs=2)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.state.global_step == 2


def test_ctrl_c_does_not_take_an_old_checkpoint_for_its_own(make_trainer, tmp_path):
    stale = tmp_path / "run/checkpoint-1"
    stale.mkdir(parents=True)
    (stale / "complete.json").write_text("{}")
    trainer = make_trainer(num_train_epochs=3, save_strategy="no")
    trainer.add_callback(InterruptsInUpdate(0))
    with pytest.raises(RunInterrupted, match="checkpoint-1"):
        trainer.train()
    assert lora(stale)


def test_ctrl_c_on_one_rank_stops_all_at_the_next_sampling_step(make_trainer, monkeypatch):
    """A stub stands for another rank, which was asked to stop."""
    trainer, asked = make_trainer(), []
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(
        trainer.accelerator, "gather", lambda flag: asked.append(bool(flag)) or torch.tensor([bool(flag), True])
    )
    with pytest.raises(StopAtBoundaryError):
        trainer.collect(0)
    assert asked == [False]


def test_ctrl_c_leaves_no_line_of_the_rollout_it_undoes(make_trainer):
    """A stop between sampling and the first update: the rollout is sampled again, and must be noted once."""
    trainer = make_trainer(num_train_epochs=2, logging_steps=2, save_strategy="no")
    rollout = trainer.rollout

    def stopping(number):
        for position, batch in enumerate(rollout(number)):
            if number == 1 and position == 1:
                trainer._stop.requested = True
            yield batch

    trainer.rollout = stopping
    with pytest.raises(RunInterrupted, match="checkpoint-1"):
        trainer.train()
    marker = json.loads(Path(trainer.args.output_dir, "checkpoint-1/complete.json").read_text())
    assert len(marker["unlogged"][0]["metrics"]["reward"]) == 1


class FullDisk(TrainerCallback):
    """The disk is full from the rollout behind the first update on."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies of it
def test_full_disk_under_the_logs_is_one_message(make_trainer, capsys):  # in memory, where there is room for it
    trainer = make_trainer(report_to=["tensorboard"], num_train_epochs=3)
    trainer.add_callback(FullDisk())
    before = set(threading.enumerate())
    with full_disk(10**9), pytest.raises(OSError, match=r"cannot write logs to .*runs: .*whole .* is .*checkpoint-1"):
        trainer.train()
    for writer in set(threading.enumerate()) - before:  # dies of it too, and is to do so before the next test
        writer.join(timeout=30)
