import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from reward.feedback import Reward
from rl.adapter import LORA_WEIGHTS
from rl.advantages import group_advantages
from rl.interrupt import RunInterrupted
from rl.resumable import StopAtBoundaryError
from rl.rollout import DivergedError
from rl.scoring import RewardError
from rl.watch_limits import MONITORS
from tests.rl.conftest import args_of, full_disk, trainer_of
from tests.rl.toy_rewards import Plain, Redness


def lora(folder):
    return load_file(f"{folder}/{LORA_WEIGHTS}")


def assert_same(left, right):
    assert left.keys() == right.keys() != set()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_ratio_is_exactly_one_on_the_first_pass_and_moves_on_the_second(make_trainer):
    """Exactly: micro-batches are the batches that the rollout ran."""
    trainer = make_trainer(num_iterations=2, num_train_epochs=2, learning_rate=0.05)
    trainer.train()
    deviation = logged(trainer, "ratio_deviation")
    assert deviation[0] == 0
    assert deviation[1] > 0
    assert deviation[2] == 0
    assert logged(trainer, "ratio")[0] == 1


def test_ratio_is_one_up_to_rounding_where_batches_differ(make_trainer):
    trainer = make_trainer(per_device_rollout_batch_size=3, num_train_epochs=1)
    trainer.train()
    assert logged(trainer, "ratio_deviation")[0] < 1e-4


def test_ratio_is_exactly_one_with_guidance(make_trainer):
    trainer = make_trainer(guidance_scale=3.0, num_train_epochs=1)
    trainer.train()
    assert logged(trainer, "ratio_deviation")[0] == 0


def test_buffer_stays_float32_whatever_the_engines_dtype(make_trainer, monkeypatch):
    """A stub stands for DeepSpeed in bfloat16, to whose dtype the Trainer casts what it feeds the model."""
    trainer = make_trainer()
    engine = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", engine)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    batch = next(trainer.rollout(0))
    inputs = trainer._prepare_inputs(batch)
    for name in ("latents", "next_latents", "old_log_probs", "advantages", "weights"):
        assert inputs[name].dtype == torch.float32, name
        assert torch.equal(inputs[name], batch[name]), name


def test_gradient_is_that_of_the_log_prob_times_the_advantage(make_trainer):
    """One update at learning rate 1 by SGD moves the LoRA by minus the policy gradient, taken by hand."""
    trainer = make_trainer(
        num_train_epochs=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    experience, policy, schedule = trainer.experience, trainer.policy, trainer.schedule
    embeds = policy.encode(experience.prompts).embeds
    objective = 0
    for k, step in enumerate(experience.trajectory.steps.tolist()):
        latents = experience.trajectory.latents[k]
        scheduler_output = policy.network(latents, schedule.timesteps[step], encoder_hidden_states=embeds).sample
        alpha, next_alpha, std = schedule.alphas[step], schedule.next_alphas[step], schedule.stds[step]
        x0 = alpha.sqrt() * latents - (1 - alpha).sqrt() * scheduler_output
        noise = alpha.sqrt() * scheduler_output + (1 - alpha).sqrt() * latents
        mean = next_alpha.sqrt() * x0 + (1 - next_alpha - std**2).sqrt() * noise
        log_probs = torch.distributions.Normal(mean, std).log_prob(experience.trajectory.next_latents[k])
        objective = objective + (experience.advantages * log_probs.mean(dim=(1, 2, 3))).mean() / 2
    objective.backward()
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            torch.testing.assert_close(after[name] - before[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_only_trained_steps_are_kept_and_advantages_are_the_groups(make_trainer):
    trainer = make_trainer(train_steps=["1"], gradient_accumulation_steps=2, num_train_epochs=1)
    trainer.train()
    experience = trainer.experience
    assert experience.trajectory.latents.shape == (1, 8, 4, 8, 8)
    assert experience.trajectory.log_probs.shape == (1, 8, 8, 8)
    assert experience.trajectory.log_probs.dtype == torch.float32
    assert len(set(experience.prompts)) == 2
    images = trainer.policy.decode(experience.trajectory.final_latents)
    expected = group_advantages(Redness()(images, experience.prompts).objective, 4, 1e-3, 5.0)
    torch.testing.assert_close(experience.advantages, expected, rtol=1e-3, atol=1e-3)


def test_batch_size_and_accumulation_are_one_and_the_same(make_trainer, tmp_path):
    weights = []
    for batch, accumulate in ((2, 8), (8, 2)):
        trainer = make_trainer(
            output_dir=str(tmp_path / str(batch)), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate, num_train_epochs=1, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        trainer.train()
        weights.append(lora(tmp_path / str(batch) / "checkpoint-1"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_nothing_but_memory(make_trainer, tmp_path):
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            output_dir=str(tmp_path / str(checkpointing)), num_train_epochs=1, activation_checkpointing=checkpointing
        )
        trainer.train()
        assert trainer.policy.pipeline.unet.is_gradient_checkpointing == checkpointing
        weights.append(lora(tmp_path / str(checkpointing) / "checkpoint-1"))
    assert_same(*weights)


def test_constant_map_makes_focus_equal_to_image_over_a_whole_run(make_trainer, tmp_path):
    weights = []
    for credit in ("image", "focus"):
        trainer = make_trainer(
            Redness(constant_map=True), credit=credit, output_dir=str(tmp_path / credit), optim="sgd", learning_rate=1.0
        )
        trainer.train()
        weights.append(lora(tmp_path / credit / "checkpoint-2"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("focus_on", ["maps", "content"])
def test_focus_changes_where_the_gradient_acts(make_trainer, focus_on):
    trainer = make_trainer(credit="focus", focus_on=focus_on, num_train_epochs=1, importance_sampling_level="location")
    trainer.train()
    weights = trainer.experience.weights
    torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(8), rtol=1e-4, atol=1e-4)
    assert weights.std() > 0.01


def test_focus_on_maps_needs_maps(make_trainer):
    with pytest.raises(ValueError, match="this one has none"):
        make_trainer(Plain(), credit="focus")  # before a picture is drawn


def test_scalar_credit_ignores_the_penalties(make_trainer):
    trainer = make_trainer(credit="scalar", num_train_epochs=1)
    trainer.train()
    images = trainer.policy.decode(trainer.experience.trajectory.final_latents)
    expected = group_advantages(Redness()(images, trainer.experience.prompts).total, 4, 1e-3, 5.0)
    torch.testing.assert_close(trainer.experience.advantages, expected, rtol=1e-3, atol=1e-3)


def test_training_raises_the_reward(make_trainer):
    trainer = make_trainer(
        num_train_epochs=9, generation_batch_size=256, num_generations=64, per_device_train_batch_size=256,
        gradient_accumulation_steps=1, learning_rate=0.02, save_strategy="no", lora_rank=4, train_steps=["1"],
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.01  # one std of the pictures of a prompt


def test_without_a_compiler_deepspeeds_op_is_switched_off(monkeypatch, caplog):
    import deepspeed

    from reward.engines import prepare_deepspeed_on_cpu

    ops = dict(deepspeed.ops.__compatible_ops__)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("PATH", "")
    try:
        prepare_deepspeed_on_cpu()
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
        assert "switched off" in caplog.text
    finally:
        deepspeed.ops.__compatible_ops__.update(ops)


def test_kl_penalty_pulls_the_policy_back_to_the_base(make_trainer, tmp_path):
    """With a reward that does not care, nothing else moves it."""

    def indifferent(images, prompts):
        return Reward(total=torch.zeros(len(images)))

    kls = []
    for beta in (0.0, 1.0):
        trainer = make_trainer(
            indifferent, output_dir=str(tmp_path / str(beta)), beta=beta, num_train_epochs=4, learning_rate=0.003,
            save_strategy="no",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        kls.append(logged(trainer, "kl"))
        assert kls[-1][0] > 0
        if beta == 0:
            assert_same(before, trainer.model.state_dict())
    assert kls[1][-1] < 0.8 * kls[1][0]


def test_first_update_has_a_learning_rate(make_trainer):
    trainer = make_trainer(warmup_steps=2, num_train_epochs=3, learning_rate=0.4)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([0.2, 0.4, 0.4])


def test_decaying_schedule_leaves_the_last_update_a_learning_rate(make_trainer):
    trainer = make_trainer(
        lr_scheduler_type="linear", warmup_steps=0, num_train_epochs=3, learning_rate=0.4, save_strategy="no"
    )
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([0.3, 0.2, 0.1])


def test_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=4, save_total_limit=None)
    whole.train()
    part = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=2)
    part.train()
    rest = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=4)
    rest.train(resume_from_checkpoint="latest")
    assert rest.state.global_step == 4
    assert_same(lora(tmp_path / "whole/checkpoint-4"), lora(tmp_path / "part/checkpoint-4"))
    assert logged(whole, "reward") == logged(rest, "reward")
    assert logged(whole, "watch/drawn") == logged(rest, "watch/drawn") != []


def test_resumed_run_with_two_passes_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    settings = {"num_iterations": 2, "learning_rate": 0.05}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=3, **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=1, **settings).train()
    rest = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=3, **settings)
    rest.train(resume_from_checkpoint="latest")
    assert_same(lora(tmp_path / "whole/checkpoint-6"), lora(tmp_path / "part/checkpoint-6"))


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


def test_emptying_pictures_are_warned_about(make_trainer, caplog):
    trainer = make_trainer(num_train_epochs=2)
    trainer.watch.load_state({"start": {"drawn": 100.0}})
    trainer.train()
    assert "learning to draw less" in caplog.text


def test_tensorboard_gets_figures_and_pictures(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(report_to=["tensorboard"], num_log_images=2, num_train_epochs=1)
    trainer.train()
    (run,) = os.listdir(f"{trainer.args.output_dir}/runs")
    events = EventAccumulator(f"{trainer.args.output_dir}/runs/{run}").Reload()
    tags = events.Tags()
    wanted = {"reward", "term/red", "penalty/implausibility", "ratio", "clip_fraction", "kl", "grad_norm", "diversity"}
    assert {f"train/{name}" for name in wanted} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]


def test_as_many_pictures_are_looked_at_as_asked_for_however_few_are_sampled_at_once(make_trainer):
    for wanted in (3, 5, 100):
        trainer = make_trainer(num_log_images=wanted, num_train_epochs=1, per_device_rollout_batch_size=2)
        experience = trainer.collect(0)
        count = min(wanted, 8)
        assert len(experience.samples.images) == len(experience.samples.reward.total) == count
        assert experience.samples.prompts == list(experience.prompts[:count])


def events_of(trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"{trainer.args.output_dir}/runs").Reload()


def curves_of(trainer):
    """TensorBoard's own view: tag -> [(step, value)]; without times."""
    events = events_of(trainer)
    tags = [tag for tag in events.Tags()["scalars"] if "seconds/" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_resumed_run_shows_every_update_once_in_tensorboard(make_trainer, tmp_path):
    """Logs of updates behind the checkpoint that a run goes on from are disowned, in the same folder."""
    settings = {"report_to": ["tensorboard"], "num_log_images": 1, "save_total_limit": None}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=4, **settings)
    whole.train()
    killed = make_trainer(num_train_epochs=3, **settings)
    killed.train()
    for step in (2, 3):
        os.remove(tmp_path / f"run/checkpoint-{step}/complete.json")  # as if it had died in the second rollout
    rest = make_trainer(num_train_epochs=4, **settings)
    rest.train(resume_from_checkpoint="auto")
    assert [step for step, _ in curves_of(rest)["train/reward"]] == [1, 2, 3, 4]
    assert curves_of(rest) == curves_of(whole)
    assert [image.step for image in events_of(rest).Images("samples")] == [1, 2, 3, 4]
    assert all(path.is_file() for path in (tmp_path / "run/runs").iterdir())


def test_a_new_run_in_an_old_folder_shows_nothing_of_the_old_one(make_trainer):
    settings = {"report_to": ["tensorboard"], "save_strategy": "no"}
    make_trainer(num_train_epochs=3, **settings).train()
    anew = make_trainer(num_train_epochs=2, **settings)
    anew.train(resume_from_checkpoint="auto")
    assert [step for step, _ in curves_of(anew)["train/reward"]] == [1, 2]


def test_lines_of_the_log_that_a_checkpoint_falls_into_are_taken_up(make_trainer, tmp_path):
    """Two updates a rollout, a line every three: the checkpoint after update 4 holds a third of the second line."""
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 3, "learning_rate": 0.05}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=3, **settings)
    whole.train()
    make_trainer(num_train_epochs=2, **settings).train()
    rest = make_trainer(num_train_epochs=3, **settings)
    rest.train(resume_from_checkpoint="latest")

    def lines(trainer):
        return [
            {name: value for name, value in entry.items() if not name.startswith("seconds/")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    assert [line["step"] for line in lines(whole)] == [3, 6]
    assert lines(rest) == lines(whole)


def test_seconds_of_a_run_are_those_of_all_its_processes(make_trainer):
    first = make_trainer(num_train_epochs=1)
    first.train()
    rest = make_trainer(num_train_epochs=1)
    rest.train(resume_from_checkpoint="latest")
    assert rest.clock.seconds["rollout"] == first.clock.seconds["rollout"]
    assert rest.train_seconds > sum(first.clock.seconds.values())


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
