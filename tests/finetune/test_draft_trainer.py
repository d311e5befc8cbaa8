"""Trainings of seconds by the gradient of a toy reward."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from finetune.backprop import Sampler
from finetune.draft_config import DraftConfig
from finetune.draft_trainer import DraftTrainer
from finetune.run import load_policy
from reward.feedback import Reward
from rl.adapter import AdapterSettings
from rl.evaluate import HeldOut
from rl.experience import rollout_noise
from rl.interrupt import RunInterrupted
from rl.policy import StableDiffusionPolicy
from rl.rollout import DivergedError, sample
from rl.scoring import RewardError
from tests.rl.conftest import PROMPTS, pipeline_folder, sd2_folder, xl_folder  # noqa: F401
from tests.rl.outcomes import assert_same, logged, lora
from tests.rl.toy_rewards import Plain, Redness

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_args(tmp_path):
    def make(**changes):
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "num_train_epochs": 2, "num_inference_steps": 3,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_rank": 2, "lora_alpha": 4.0,
            "disable_tqdm": True, "report_to": [], "seed": 3, "num_log_images": 0, "save_steps": 1,
        }  # fmt: skip
        return DraftConfig(**{**settings, **changes})

    return make


@pytest.fixture
def make_trainer(pipeline_folder, make_args):  # noqa: F811
    def make(reward=None, held_out=None, folder=pipeline_folder, **changes):
        args = make_args(**changes)
        adapter = asdict(args.part(AdapterSettings))
        policy = StableDiffusionPolicy.load(folder, seed=args.seed, keep_reference=args.needs_reference, **adapter)
        return DraftTrainer(policy, reward or Redness(), args, PROMPTS, held_out=held_out)

    return make


def trained(trainer):
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.policy.network.named_parameters()
            if weight.requires_grad}  # fmt: skip


VARIANTS = {
    "draft": {},
    "draft_k": {"backprop_steps": 2},
    "draft_lv": {"lv_draws": 2},
    "alignprop": {"backprop_range": [1, 2]},
    "refl": {"refl_steps": 2},
}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients_of_the_distance_are_kept_only_where_it_guards(make_trainer, monkeypatch, beta):
    draw, seen = Sampler.draw, []

    def spied(*arguments):
        drawn = draw(*arguments)
        seen.append(None if drawn.noise_distance is None else drawn.noise_distance.requires_grad)
        return drawn

    monkeypatch.setattr(Sampler, "draw", spied)
    trained(make_trainer(beta=beta, num_train_epochs=1))
    assert seen == ([True, True] if beta else [False, None])


@pytest.mark.parametrize("family", ["pipeline_folder", "sd2_folder", "xl_folder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_raises_the_reward_of_every_family(make_trainer, variant, family, request):
    """With guidance. The second family's schedule begins in pure noise."""
    how = {"num_train_epochs": 6, "learning_rate": 3e-2, "guidance_scale": 2.0, "beta": 1e-3}
    trainer = make_trainer(folder=request.getfixturevalue(family), variant=variant, **VARIANTS[variant], **how)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[-1] > rewards[0] + 0.01


def test_batch_size_and_accumulation_are_one_and_the_same(make_trainer, tmp_path):
    how = {"optim": "sgd", "learning_rate": 1.0, "variant": "alignprop", "num_train_epochs": 3, "lora_dropout": 0.5}
    many = trained(make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **how))
    one = trained(make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=1, **how))
    assert_same(many, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["recompute_steps", "activation_checkpointing"])
def test_checkpointing_changes_nothing_but_memory(make_trainer, checkpointing):
    """Nor does it where gradients flow through the base model too, for the guard, or where inputs are dropped."""
    how = {"optim": "sgd", "learning_rate": 1.0, "variant": "draft", "num_train_epochs": 2, "beta": 0.1,
           "lora_dropout": 0.5}  # fmt: skip
    with_it, without = (trained(make_trainer(**{checkpointing: on}, **how)) for on in (True, False))
    assert_same(with_it, without, rtol=1e-4, atol=1e-7)
    whole = trained(make_trainer(**how | {"lora_dropout": 0.0}))
    assert any((without[name] - whole[name]).abs().max() > 1e-5 for name in whole)


def test_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    """With everything that a run remembers: moving average, watch, logs, random reaches."""
    how = {
        "variant": "alignprop", "ema_decay": 0.5, "num_train_epochs": 4, "region_weight": 0.5, "region_threshold": 0.2,
        "beta": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 2, "lora_dropout": 0.1,
    }  # fmt: skip
    whole = make_trainer(held_out=Plain(), output_dir=str(tmp_path / "whole"), save_total_limit=4, **how)
    whole.train()
    whole.save_model()
    part = make_trainer(held_out=Plain(), output_dir=str(tmp_path / "part"), **how)
    part.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    part.save_model()
    assert_same(lora(tmp_path / "part"), lora(tmp_path / "whole"))
    assert_same(lora(tmp_path / "part/checkpoint-4"), lora(tmp_path / "whole/checkpoint-4"))
    assert {**part.watch.state(), "best": None} == {**whole.watch.state(), "best": None}
    for name in ("reward", "loss", "grad_norm", "learning_rate", "watch/drawn", "region/change_outside"):
        assert logged(part, name) == logged(whole, name)


def test_text_encoder_learns_too_whether_or_not_steps_are_computed_again(make_trainer):
    how = {"train_text_encoder": True, "num_train_epochs": 1, "beta": 0.1, "optim": "sgd", "learning_rate": 0.1}
    again, kept = (trained(make_trainer(recompute_steps=recompute, **how)) for recompute in (True, False))
    assert_same(again, kept, rtol=1e-4, atol=1e-6)
    moved = [weight.abs().max() > 0 for name, weight in again.items() if name.startswith("text") and "lora_B" in name]
    assert moved
    assert all(moved)


def picture_change(trainer):
    """Mean difference of what the policy draws now from what the base draws, from noise that it has not seen."""
    policy = trainer.policy
    noise = rollout_noise(policy, trainer.schedule, 99, 0, range(4))

    def draw():
        return policy.decode(sample(policy, policy.network, PROMPTS[:4], noise, trainer.schedule).final_latents)

    now = draw()
    with policy.reference():
        return float((now - draw()).abs().mean())


def test_without_a_problem_region_the_constraint_holds_all_of_the_picture(make_trainer):
    """Redness' map costs at most 0.5 anywhere: above that threshold there is no problem."""
    how = {
        "num_train_epochs": 16, "learning_rate": 3e-3, "lr_scheduler_type": "linear", "save_strategy": "no",
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    free, held = make_trainer(**how), make_trainer(region_weight=20.0, region_threshold=0.6, **how)
    free.train()
    held.train()
    assert set(logged(held, "region/share")) == {0.0}
    assert logged(held, "region/change_outside") == logged(held, "region/change")
    assert picture_change(held) < 0.1 * picture_change(free)


def test_without_a_problem_region_nothing_changes(make_trainer):
    """Where the reward reaches the policy through problem regions only: not a bit of any weight."""
    how = {"optim": "sgd", "learning_rate": 1.0, "region_weight": 20.0, "region_gradient": "region"}
    nothing = trained(make_trainer(region_threshold=0.6, **how))
    assert_same(nothing, trained(make_trainer(region_threshold=0.6, **{**how, "learning_rate": 0.0})))
    assert not all(
        torch.equal(one, nothing[name]) for name, one in trained(make_trainer(region_threshold=0.2, **how)).items()
    )


def test_where_all_of_the_picture_is_a_problem_the_constraint_does_nothing(make_trainer):
    how = {"optim": "sgd", "learning_rate": 1.0}
    free, held = make_trainer(**how), make_trainer(region_weight=20.0, region_threshold=0.0, region_dilation=0.5, **how)
    assert_same(trained(free), trained(held))
    assert set(logged(held, "region/share")) == {1.0}


@pytest.mark.parametrize("distance", ["noise", "kl"])
def test_distance_to_the_base_holds_the_policy_back(make_trainer, distance):
    how = {
        "num_train_epochs": 5, "learning_rate": 1e-2, "variant": "draft", "save_strategy": "no",
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    free, held = make_trainer(**how), make_trainer(beta=1000.0, distance=distance, **how)
    free.train()
    held.train()
    name = "noise_distance" if distance == "noise" else "kl"
    assert logged(held, name)[0] == 0  # the LoRA starts as nothing
    assert logged(held, name)[-1] < 0.2 * logged(free, name)[-1]
    assert logged(held, "reward")[-1] > logged(held, "reward")[0] - 0.01


def test_monitors_end_the_run(make_trainer, caplog):
    trainer = make_trainer(
        held_out=Plain(), num_train_epochs=6, learning_rate=1e-2, variant="draft", watch_limits={"kl": 1e-9},
        stop_on=["kl"],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    assert "the policy is far from the base" in caplog.text
    seen = trainer.state.log_history[0]
    assert {"watch/held_out", "watch/diversity", "watch/drawn", "watch/file_size", "watch/kl", "watch/map_entropy"} <= (
        seen.keys()
    )
    assert trainer.best_checkpoint == Path(trainer.args.output_dir) / "checkpoint-1"


def test_tensorboard_gets_figures_pictures_and_regions(make_trainer):
    trainer = make_trainer(report_to=["tensorboard"], num_log_images=2, region_weight=1.0, region_threshold=0.2)
    trainer.train()
    events = EventAccumulator(f"{trainer.args.output_dir}/runs")
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "region"}
    assert {"train/reward", "train/watch/drawn", "train/region/change_outside"} <= set(events.Tags()["scalars"])


def test_the_reward_is_asked_about_as_few_pictures_at_once_as_is_said(make_trainer):
    asked = []

    class Counting(Redness):
        def __call__(self, images, prompts):
            asked.append(len(images))
            return super().__call__(images.square(), prompts)  # something to keep for the backward pass

    how = {"variant": "draft_lv", "lv_draws": 3, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0}
    few = trained(make_trainer(Counting(), reward_batch_size=5, **how))
    assert max(asked) == 5  # of 3 draws of 4 prompts
    # In both micro-batches once forward and once backward, so that one batch's activations are kept at a time.
    assert asked[1:] == 2 * [5, 5, 2, 2, 5, 5], "the first is the look at the reward"
    assert_same(few, trained(make_trainer(Counting(), **how)), rtol=1e-4, atol=1e-6)
    assert max(asked) == 12


def test_a_reward_is_asked_in_its_own_precision_whatever_the_run_has(make_trainer):
    """In training, and in the evaluations that are compared with it."""
    seen = []

    class Spied(Redness):
        def __call__(self, images, prompts):
            assert images.dtype == torch.float32
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(images, prompts)

    trainer = make_trainer(Spied(), bf16=True, num_train_epochs=1)
    trainer.train()
    trainer.judge(HeldOut(PROMPTS[:2], {"reward": trainer.reward_fn}))
    assert len(seen) > 3
    assert not any(seen)


def test_a_reward_whose_gradient_is_nothing_is_warned_of(make_trainer, caplog):
    class Rounding(Redness):
        def __call__(self, images, prompts):
            return super().__call__((255 * images).round() / 255, prompts)

    make_trainer(Rounding())
    assert "the gradient of the reward Rounding is 0 in every place" in caplog.text
    caplog.clear()
    make_trainer(Redness())
    assert "gradient" not in caplog.text


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (50.0, "no picture has a problem region, so the constraint holds all of every picture"),
        (0.0, "the problem regions are whole pictures, so the constraint holds nothing"),
        (0.35, ""),
    ],
)
def test_a_threshold_that_tells_no_region_is_said_once(make_trainer, caplog, threshold, said):
    trainer = make_trainer(num_train_epochs=4, region_weight=1.0, region_threshold=threshold)
    trainer.train()
    assert caplog.text.count("the constraint holds") == (1 if said else 0)
    assert said in caplog.text
    largest = sum(logged(trainer, "region/largest_cost")[:3]) / 3
    assert not said or f"costs {largest:.3g} (mean of the first 3 updates" in caplog.text


def test_the_divergence_of_the_last_steps_has_no_limit_of_its_own(make_args):
    assert make_args().watch_limits == {"kl": None}
    assert make_args(watch_limits={"kl": 0.5, "drawn": 0.7}).watch_limits == {"kl": 0.5, "drawn": 0.7}
    with pytest.raises(ValueError, match="stop_on names 'kl', which has no limit; give it one"):
        make_args(stop_on=["kl"])


class Liar:
    """Says that it is differentiable, and is not, but by a weight of its own."""

    differentiable = True
    weight = torch.ones((), requires_grad=True)

    def __call__(self, images, prompts):
        return Reward(total=self.weight * images.detach().mean(dim=(1, 2, 3)))


class Mapless:
    differentiable = True

    def __call__(self, images, prompts):
        return Reward(total=images.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("reward", "changes", "message"),
    [
        (Plain(), {}, r"the reward Plain is not differentiable.*reward\.rich:RichReward.*run_ddpo\.py"),
        (Liar(), {}, "Liar says that it is differentiable, but no gradient flows"),
        (Mapless(), {"region_weight": 1.0}, "region_weight is 1.0, but the reward Mapless has no penalty maps"),
        (Redness(), {"beta": 1.0, "distance": "kl"}, "those of update 1 .2 to 2, variant draft_k. have none"),
        (Redness(), {"beta": 1.0, "tune": "full"}, None),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_a_picture_is_drawn(make_trainer, reward, changes, message):
    if message is None:
        assert make_trainer(reward, **changes).policy.has_reference
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(reward, **changes)


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(make_trainer):
    trainer = make_trainer(Redness(nan_after=4))  # one to look at it, two an update, and one behind them
    with pytest.raises(RewardError, match="term `red` is nan for the prompt"):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1/complete.json").exists()


def test_policy_that_diverges_stops_the_run(make_trainer):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            next(weight for weight in model.parameters() if weight.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(save_strategy="no")
    trainer.add_callback(Diverge())
    with pytest.raises(DivergedError, match="in update 2 its latents are not finite"):
        trainer.train()


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_goes_on(make_trainer, tmp_path):
    """In the middle of an update: it is gone through again."""
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=3)
    whole.train()

    class InterruptingReward(Redness):
        def __call__(self, images, prompts):
            if self.calls == 3:  # the first picture of the second update
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(images, prompts)

    trainer = make_trainer(InterruptingReward(), num_train_epochs=3, save_strategy="no")
    with pytest.raises(RunInterrupted, match="stopped after 2 of 3 updates"):
        trainer.train()
    again = make_trainer(num_train_epochs=3)
    again.train(resume_from_checkpoint="latest")
    assert_same(lora(tmp_path / "run/checkpoint-3"), lora(tmp_path / "whole/checkpoint-3"))
    assert logged(again, "loss") == logged(whole, "loss")


@pytest.mark.timeout(600)
def test_two_ranks_are_one(pipeline_folder, make_trainer, tmp_path):  # noqa: F811
    """By DDP and by ZeRO-2."""
    how = {"optim": "sgd", "learning_rate": 1.0, "variant": "draft", "beta": 0.1, "region_weight": 0.5}
    one = make_trainer(held_out=Plain(), region_threshold=0.2, gradient_accumulation_steps=4, **how)
    one.train()
    one.save_model()
    engines = ("ddp", "zero2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(Path(__file__).parent / "two_ranks_draft.py"), pipeline_folder, str(tmp_path), *engines]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for engine in engines:
        assert_same(lora(tmp_path / engine), lora(tmp_path / "run"), rtol=1e-3, atol=1e-5)
        states = [json.loads((tmp_path / f"{engine}-watch-{rank}.json").read_text()) for rank in (0, 1)]
        assert states[0] == states[1]
        assert states[0]["start"] == pytest.approx(one.watch.state()["start"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("variant", ["draft_k", "draft"])
def test_in_bfloat16_a_policy_that_is_the_base_is_at_no_distance_from_it(pipeline_folder, make_args, tune, variant):  # noqa: F811
    """As `finetune.draft` loads it; the guards would else be fed with rounding."""
    args = make_args(
        tune=tune, variant=variant, bf16=True, model_dtype="bfloat16" if tune == "lora" else "float32", eta=1.0,
        learning_rate=0.0, weight_decay=0.0, beta=1.0, distance="kl", region_weight=1.0, region_threshold=0.1,
        num_train_epochs=1, backprop_steps=2,
    )  # fmt: skip
    trainer = DraftTrainer(load_policy(pipeline_folder, args), Redness(), args, PROMPTS)
    trainer.train()
    found = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert found["noise_distance"] == found["kl"] == found["region/change_outside"] == found["region/change"] == 0
    assert found["region/share"] > 0
    assert {weight.dtype for weight in trainer.trained_weights()} == {torch.float32}


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_in_bfloat16_learns_as_in_float32(pipeline_folder, make_args, tune):  # noqa: F811
    rewards = []
    for bf16 in (False, True):
        args = make_args(tune=tune, bf16=bf16, learning_rate=0.01, num_train_epochs=6)
        trainer = DraftTrainer(load_policy(pipeline_folder, args), Redness(), args, PROMPTS)
        trainer.train()
        rewards.append([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
    exact, rounded = rewards
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.1 * (exact[-1] - exact[0]))
    assert exact[-1] > exact[0]
