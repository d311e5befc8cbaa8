"""Evaluations in the midst of a run: where they fall, what they leave, and that they change nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl.callbacks import show_at_end
from rl.evaluate import TRAINING_REWARD, HeldOut
from rl.interrupt import RunInterrupted
from tests.rl.conftest import PROMPTS
from tests.rl.test_ddpo import assert_same, lora
from tests.rl.toy_rewards import Plain, Redness

HELD_OUT = HeldOut(PROMPTS[:2], {TRAINING_REWARD: Redness(), "judge": Plain()}, generations=1, num_samples=2)
SETTINGS = {"eval_on": HELD_OUT, "report_to": ["tensorboard"], "learning_rate": 0.05}


def curve(trainer, name):
    folder = str(Path(trainer.args.output_dir, "runs"))
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def images(trainer, name):
    """TensorBoard's own view of pictures: [(step, PNG)]."""
    folder = str(Path(trainer.args.output_dir, "runs"))
    events = EventAccumulator(folder, size_guidance={"images": 0}).Reload()
    return [(event.step, event.encoded_image_string) for event in events.Images(name)]


def lines(trainer):
    """The lines of the log that evaluations left."""
    return [entry for entry in trainer.state.log_history if "eval_reward" in entry]


def sheets(trainer):
    return {file.name: file.read_bytes() for file in sorted(Path(trainer.args.output_dir, "samples").iterdir())}


def test_evaluations_leave_curves_and_sheets_and_change_nothing_else(make_trainer, tmp_path):
    """Two updates a rollout, an evaluation every second rollout."""
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 4}
    make_trainer(output_dir=str(tmp_path / "plain"), learning_rate=0.05, **settings).train()
    trainer = make_trainer(eval_strategy="steps", eval_steps=4, **settings, **SETTINGS)
    first, _ = trainer.judge(HELD_OUT)
    trainer.train()
    last, _ = trainer.judge(HELD_OUT)
    assert_same(lora(tmp_path / "plain/checkpoint-8"), lora(tmp_path / "run/checkpoint-8"))
    assert [step for step, _ in curve(trainer, "eval/reward")] == [4, 8]
    assert [step for step, _ in curve(trainer, "eval/judge/satisfied")] == [4, 8]
    assert lines(trainer)[-1]["eval_reward"] == last.summary()["reward"] != first.summary()["reward"]
    assert "eval_diversity" not in lines(trainer)[0], "of a single picture of each prompt"
    assert list(sheets(trainer)) == ["rollout-000002.png", "rollout-000004.png"]
    assert len(set(sheets(trainer).values())) == 2
    with Image.open(tmp_path / "run/samples/rollout-000002.png") as sheet:
        assert sheet.width >= 2 * 128, "two columns of pictures"
    assert trainer.clock.seconds["evaluation"] > 0


@pytest.mark.parametrize("strategy", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 1}])
def test_a_run_that_goes_on_has_each_evaluation_once(make_trainer, tmp_path, strategy):
    """It goes on from rollout 2, and had evaluated rollout 3 as well before it was killed."""
    settings = {**SETTINGS, **strategy, "ema_decay": 0.5}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=4, **settings)
    whole.train()
    make_trainer(num_train_epochs=3, **settings).train()
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    rest = make_trainer(num_train_epochs=4, **settings)
    rest.train(resume_from_checkpoint="latest")
    assert [step for step, _ in curve(whole, "eval/reward")] == [1, 2, 3, 4]
    assert curve(rest, "eval/reward") == curve(whole, "eval/reward")
    assert lines(rest) == lines(whole)
    assert sheets(rest) == sheets(whole)
    assert [step for step, _ in images(whole, "evaluation")] == [1, 2, 3, 4]
    assert images(rest, "evaluation") == images(whole, "evaluation")
    assert_same(lora(tmp_path / "whole/checkpoint-4"), lora(tmp_path / "run/checkpoint-4"))


def test_what_is_shown_at_the_end_stands_there_once_and_not_in_the_midst(make_trainer):
    """A run of 2 updates that was killed behind it and ends again, and then goes on for a third."""
    sheet = Image.new("RGB", (8, 8), "red")
    settings = {"report_to": ["tensorboard"], "num_log_images": 0}
    for updates in (2, 2, 3):
        trainer = make_trainer(num_train_epochs=updates, **settings)
        trainer.train(resume_from_checkpoint="auto")
        for _ in range(2):
            show_at_end(trainer, "before_after", sheet)
        assert [step for step, _ in images(trainer, "before_after")] == [updates + 1]
        assert [step for step, _ in curve(trainer, "train/loss")] == list(range(1, updates + 1))


def test_without_tensorboard_nothing_is_shown_at_the_end(make_trainer, tmp_path):
    trainer = make_trainer(num_train_epochs=1, save_strategy="no")
    trainer.train()
    show_at_end(trainer, "before_after", Image.new("RGB", (8, 8)))
    assert not (tmp_path / "run/runs").exists()


def test_a_checkpoint_holds_the_evaluation_of_its_update(make_trainer, tmp_path):
    """Also where it is written by updates and the evaluation is made by epochs."""
    trainer = make_trainer(num_train_epochs=1, save_strategy="steps", save_steps=1, eval_strategy="epoch", **SETTINGS)
    trainer.train()
    state = json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_reward" in entry] == [1]
    assert len(lines(trainer)) == 1


def test_sheets_of_a_branch_that_is_left_are_deleted(make_trainer):
    settings = {**SETTINGS, "eval_strategy": "epoch", "save_total_limit": None, "num_train_epochs": 3}
    make_trainer(**settings).train()
    rest = make_trainer(**settings)
    rollout = rest.rollout

    def stopping(number):
        rest._stop.requested = True
        return rollout(number)

    rest.rollout = stopping
    with pytest.raises(RunInterrupted):
        rest.train(resume_from_checkpoint=f"{rest.args.output_dir}/checkpoint-2")
    assert list(sheets(rest)) == ["rollout-000001.png", "rollout-000002.png"]


def test_averaged_weights_are_judged_and_the_others_go_on(make_trainer):
    settings = {"num_train_epochs": 2, "ema_decay": 0.5, "save_strategy": "no"}
    trainer = make_trainer(eval_strategy="epoch", **settings, **SETTINGS)
    seen, judge = [], trainer.judge

    def noting(held_out):
        seen.append(([weight.clone() for weight in trainer.trained_weights()], list(trainer.average.shadow_params)))
        return judge(held_out)

    trainer.judge = noting
    trainer.train()
    assert len(seen) == 2
    for weights, average in seen[1:]:
        assert all(map(torch.equal, weights, average))
    plain = make_trainer(learning_rate=0.05, **settings)
    plain.train()
    assert all(map(torch.equal, trainer.trained_weights(), plain.trained_weights()))


def test_an_evaluation_needs_prompts(make_trainer):
    with pytest.raises(ValueError, match="eval_strategy is epoch, but there are no held-out prompts"):
        make_trainer(eval_strategy="epoch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, r"eval_steps \(3\) .* 2 updates .* use 2 or 4"),
        ({"eval_strategy": "steps"}, r"eval_steps \(1\) .* use 2, or eval_strategy epoch"),
        ({"eval_strategy": "often"}, "eval_strategy is 'often'; it must be one of epoch, steps, no"),
        ({"eval_strategy": "epoch", "eval_on_start": True}, "eval_on_start would evaluate again"),
        ({"eval_strategy": "epoch", "load_best_model_at_end": True}, "load_best_model_at_end goes by .* watch_reward"),
    ],
)
def test_settings_that_cannot_be(make_args, changes, message):
    with pytest.raises(ValueError, match=message):
        make_args(gradient_accumulation_steps=2, **changes).plan(2)


def test_no_of_a_yaml_is_no(make_args):
    assert make_args(eval_strategy=False).eval_strategy == "no"
