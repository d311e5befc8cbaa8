"""Trainings that are watched: games are caught, sound ones are not, and what a stop leaves is the best there was."""

import json
import os
from contextlib import nullcontext

import pytest
import torch

from finetune.run import watch_facts
from finetune.run_arguments import RewardedRunArguments
from reward.arguments import parse_arguments
from reward.feedback import Reward
from reward.others import PickScore
from rl.ddpo_config import DDPOConfig
from rl.evaluate import HeldOut
from rl.monitors import (
    edge_energy,
)
from rl.run_state import RunState
from rl.sde import kl_map, step_mean
from rl.watch_limits import MONITORS
from tests.rl.conftest import PROMPTS
from tests.test_house import ROOT


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def edges(images, prompts):
    return Reward(edge_energy(images))


def no_edges(images, prompts):
    """Easy to game: what is not drawn has none."""
    return Reward(-edge_energy(images))


def red(images, prompts):
    return Reward(images[:, 0].mean((1, 2)))


def red_below(images, prompts):
    return Reward(images[:, 0, 8:].mean((1, 2)))


@pytest.mark.parametrize(("trained", "held_out", "gamed"), [(no_edges, edges, True), (red, red_below, False)])
def test_a_reward_that_is_gamed_trips_its_monitors_and_a_sound_one_none(make_trainer, trained, held_out, gamed, caplog):
    """An untrained network moves far at once, and cannot empty its pictures: hence other limits than the defaults."""
    trainer = make_trainer(
        trained, held_out=held_out, watch_limits={"kl": 1e9, "drawn": 0.975},
        num_train_epochs=7, generation_batch_size=64, num_generations=32, per_device_train_batch_size=64,
        gradient_accumulation_steps=1, learning_rate=0.1 if gamed else 0.02, warmup_steps=0, lora_rank=4,
        train_steps=["1"], save_strategy="no",
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "reward")[-1] > logged(trainer, "reward")[0]
    said = [record.getMessage() for record in caplog.records if record.name == "rl.watch"]
    assert any("the held-out reward falls" in line for line in said) == gamed
    assert any("learning to draw less" in line for line in said) == gamed
    assert bool(said) == gamed
    shown = {name.removeprefix("watch/") for name in trainer.state.log_history[-2] if name.startswith("watch/")}
    told_by_none = {"saturation", "map_entropy"}  # these rewards have neither ranges nor maps
    assert shown == set(MONITORS) - told_by_none - {"evaluated"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ddpo_*.yaml")), ids=lambda path: path.name)
def test_presets_watch_a_reward_that_training_does_not_see(path, monkeypatch):
    """But for the small world's, whose other reward is the judge. The weights may be nowhere here."""
    monkeypatch.setattr("reward.others.clip.check_folder", lambda *_, **__: None)
    flags = ["--config", str(path), "--use_cpu", "--bf16", "false"]
    run, args = parse_arguments([RewardedRunArguments, DDPOConfig], flags)
    assert "held_out" not in args.stop_on
    if "tinyworld" in path.name:
        assert not run.watch_reward
        assert "# No watch_reward: the only other reward here is the judge" in path.read_text()
        return
    assert isinstance(run.make_eval_rewards()[run.watch_reward], PickScore)
    left_out, _ = parse_arguments(
        [RewardedRunArguments, DDPOConfig], [*flags, "--eval_rewards", "{}", "--watch_reward", ""]
    )
    assert not left_out.watch_reward
    assert not left_out.make_eval_rewards()


def fading(trainer, contrasts):
    """Let the policy draw with these contrasts, one a rollout (of one update)."""
    decode = trainer.policy.decode

    def faded(latents):
        return 0.5 + contrasts[min(trainer.state.global_step, len(contrasts) - 1)] * (decode(latents) - 0.5)

    trainer.policy.decode = faded
    return trainer


def test_an_evaluation_that_finds_less_than_before_training_ends_the_run(make_trainer, caplog):
    """The second is of pictures that have faded; what is trained on is the contrast, as is what is held out."""
    rewards = {"reward": edges, "other": no_edges}
    trainer = make_trainer(
        edges, held_out=no_edges, eval_on=HeldOut(["a red star", "a blue circle", "a green square"], rewards),
        eval_strategy="epoch", stop_on=["evaluated"], watch_limits={"reward": None}, num_train_epochs=9,
        save_strategy="no", learning_rate=1e-9,
    )  # fmt: skip
    fading(trainer, [1.0, 1.0, 0.5]).train()
    assert trainer.state.global_step == 2
    assert trainer.watch.stopping == ["evaluated"]
    values = logged(trainer, "watch/evaluated")
    assert values[0] == 0
    assert values[1] < -3
    assert "the trained or the held-out reward lower than it was" in caplog.text


def test_what_the_command_finds_before_training_is_what_evaluations_are_held_against(make_trainer):
    trainer = make_trainer(edges, eval_on=HeldOut(PROMPTS, {"reward": edges}))
    fading(trainer, [1.0, 0.5])
    figures, _ = trainer.judge(trainer.eval_on)
    assert trainer.watch_evaluation(figures, trainer.eval_on.rewards) == {"evaluated": 0.0}
    trainer.state.global_step = 1
    figures, _ = trainer.judge(trainer.eval_on)
    assert trainer.watch_evaluation(figures, trainer.eval_on.rewards)["evaluated"] < -3


def test_stop_on_ends_the_run_and_keeps_the_best_checkpoint(make_trainer, caplog):
    """The rollout from checkpoint 1 holds most; that from checkpoint 4 too little, so that update 5 is the last."""
    trainer = make_trainer(
        held_out=edges, stop_on=["drawn"], watch_limits={"kl": None}, num_train_epochs=9, save_total_limit=1
    )
    fading(trainer, [0.8, 1.0, 0.9, 0.7, 0.4]).train()
    assert trainer.state.global_step == 5
    assert trainer.watch.stopping == ["drawn"]
    assert "stopping after 5 of 9 updates: watch/drawn across its limit" in caplog.text
    kept = sorted(name for name in os.listdir(trainer.args.output_dir) if name != "runs")
    assert kept == ["checkpoint-1", "checkpoint-5"]
    assert trainer.best_checkpoint.name == "checkpoint-1"
    assert trainer.left == trainer.best_checkpoint
    assert (trainer.best_checkpoint / "complete.json").exists()


def test_a_run_that_only_warns_goes_on(make_trainer, caplog):
    trainer = fading(make_trainer(num_train_epochs=3), [1.0, 0.4])
    trainer.train()
    assert trainer.state.global_step == 3
    assert sum("learning to draw less" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"tune": "full"}], ids=["LoRA", "average", "U-Net"])
def test_without_a_held_out_reward_the_last_sound_checkpoint_is_what_a_stop_leaves(make_trainer, tmp_path, changes):
    """Rollouts 0 .. 2 are sound, so checkpoint 2 is; 3 is not. Killed at its end, it ends alike."""

    def make():
        trainer = make_trainer(
            stop_on=["drawn"], watch_limits=dict.fromkeys(set(MONITORS) - {"drawn"}), num_train_epochs=9,
            save_total_limit=1, save_strategy="steps", save_steps=1, learning_rate=0.02, **changes,
        )  # fmt: skip
        return fading(trainer, [1.0, 0.9, 0.8, 0.5, 0.4])

    trainer = make()
    trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(name for name in os.listdir(tmp_path / "run") if "check" in name) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.best_checkpoint == trainer.left == tmp_path / "run/checkpoint-2"
    assert watch_facts(trainer) == {
        "over": ["drawn"], "stopped_by": ["drawn"], "left": str(trainer.left),
        "best_checkpoint": {"path": str(trainer.left), "global_step": 2},
    }  # fmt: skip
    left = [weight.clone() for weight in trainer.trained_weights()]
    wanted = make()
    wanted.policy.load_adapter(tmp_path / "run/checkpoint-2")
    if wanted.average is not None:
        wanted._load_average(RunState.read(tmp_path / "run/checkpoint-2"))
        wanted.average.copy_to(wanted.trained_weights())
    assert all(map(torch.equal, left, wanted.trained_weights()))

    again = make()
    again.train(resume_from_checkpoint="latest")
    assert again.state.global_step == 4
    assert again.experience is None
    assert again.watch.state() == trainer.watch.state()
    assert all(map(torch.equal, left, again.trained_weights()))


def test_a_stop_without_a_sound_checkpoint_leaves_the_last_update(make_trainer, caplog):
    trainer = make_trainer(stop_on=["drawn"], num_train_epochs=4, save_strategy="no")
    fading(trainer, [1.0, 0.4]).train()
    assert trainer.state.global_step == 2
    assert trainer.left is trainer.best_checkpoint is None
    assert (
        "watch/drawn across its limit, and no checkpoint from before: the LoRA left is that of the last update"
        in caplog.text
    )


def test_a_resumed_run_watches_as_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    def run(folder, rollouts, **resume):
        contrasts = [0.8, 1.0, 0.4, 0.9]
        trainer = make_trainer(
            edges,
            held_out=red,
            eval_on=HeldOut(PROMPTS, {"reward": edges, "other": red}),
            eval_strategy="epoch",
            output_dir=str(tmp_path / folder),
            num_train_epochs=rollouts,
            save_total_limit=1,
        )
        fading(trainer, contrasts).train(**resume)
        return trainer

    whole = run("whole", 4)
    run("part", 2)
    rest = run("part", 4, resume_from_checkpoint="latest")
    for name in set(MONITORS) - {"saturation", "map_entropy"}:
        assert logged(whole, f"watch/{name}") == logged(rest, f"watch/{name}"), name
        assert len(set(logged(whole, f"watch/{name}"))) > 1 or name == "dead_groups", name
        assert len(logged(whole, f"watch/{name}")) == 4, name
    assert whole.watch.state() == rest.watch.state()
    assert whole.watch.best is not None
    assert os.listdir(tmp_path / "whole") == os.listdir(tmp_path / "part")


def test_going_on_from_another_folder_has_no_best_checkpoint_yet(make_trainer, tmp_path):
    fading(make_trainer(held_out=edges, num_train_epochs=3, save_total_limit=None), [0.8, 1.0, 0.9]).train()
    assert json.loads((tmp_path / "run/checkpoint-3/run_state.json").read_text())["watch"]["best"]["global_step"] == 1
    other = make_trainer(held_out=edges, num_train_epochs=4, output_dir=str(tmp_path / "other"))
    other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert other.best_checkpoint is None


def move_away(policy):
    """As if it had been trained: a LoRA starts as nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.network.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("accumulate", [8, 2])
def test_kl_is_the_mean_over_all_trained_steps(make_trainer, accumulate):
    """By hand, of a rollout's first micro-batch of pictures; with 2 micro-batches an update, nothing is learnt here."""
    trainer = make_trainer(
        num_inference_steps=5, train_steps=["all"], num_train_epochs=1, save_strategy="no",
        gradient_accumulation_steps=accumulate, learning_rate=0.02 if accumulate == 8 else 1e-12,
    )  # fmt: skip
    policy, schedule = trainer.policy, trainer.schedule
    move_away(policy)
    experience = trainer.collect(0)
    conditioning, kls = policy.encode(experience.prompts[:4]), []
    for k, step in enumerate(experience.trajectory.steps.tolist()):
        latents, index = experience.trajectory.latents[k, :4], torch.full((4,), step)
        means = []
        for place in (nullcontext(), policy.reference()):
            with torch.no_grad(), place:
                output = policy.predict(policy.network, latents, schedule.timesteps[index], conditioning)
                mean, std = step_mean(output, latents, index, schedule)
                means.append(mean)
        kls.append(float(kl_map(*means, std).mean()))
    assert len(kls) == 4
    assert max(kls) > 5 * kls[0] > 0
    trainer.train()
    assert logged(trainer, "watch/kl") == pytest.approx([sum(kls) / 4], rel=1e-4)


def test_kl_is_measured_without_touching_the_training(make_trainer, monkeypatch):
    watched = make_trainer(save_strategy="no")
    watched.train()
    monkeypatch.setattr("rl.lora.Lora.has_reference", False)
    plain = make_trainer(save_strategy="no")
    plain.train()
    assert len(logged(watched, "watch/kl")) == 2
    assert not logged(plain, "watch/kl")
    assert logged(watched, "loss") == logged(plain, "loss")
    assert all(map(torch.equal, watched.trained_weights(), plain.trained_weights()))


ONE = {"num_generations": 1, "advantage_baseline": "batch"}


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("diversity", ONE, "num_generations is 1"),
        ("dead_groups", ONE, "num_generations is 1"),
        ("agreement", ONE, "num_generations is 1"),
        ("kl", {"tune": "full"}, "tune is full and keeps no copy of the base"),
        ("evaluated", {}, "eval_strategy is no"),
    ],
)
def test_what_settings_never_measure_cannot_end_a_run(make_args, name, settings, why):
    assert make_args(stop_on=["all"], **settings).never_measured[name].startswith(why)
    with pytest.raises(ValueError, match=f"stop_on names {name}, which this run never measures: {why}"):
        make_args(stop_on=["drawn", name], **settings)
    evaluated = {"eval_strategy": "epoch"}
    assert not make_args(stop_on=[name], **evaluated).never_measured
    assert not make_args(stop_on=["kl"], tune="full", beta=0.1, **evaluated).never_measured


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("held_out", "there is no held-out reward"),
        ("agreement", "there is no held-out reward"),
        ("saturation", "the reward does not tell the `ranges`"),
    ],
)
def test_what_rewards_never_tell_cannot_end_a_run(make_trainer, name, why):
    with pytest.raises(ValueError, match=f"stop_on names {name}, which this run never measures: {why}"):
        make_trainer(red, stop_on=[name])
    assert why in make_trainer(red, stop_on=["all"]).watch.off[name]


class Ranged:
    """Tells the range of a term that it does not have."""

    def __init__(self):
        self.ranges = {"absent": (0.0, 1.0)}

    def __call__(self, images, prompts):
        return Reward(images[:, 0].mean((1, 2)), terms={"red": images[:, 0].mean((1, 2))})


@pytest.mark.parametrize("name", ["saturation", "map_entropy"])
def test_what_the_first_rollout_lacks_is_said_before_an_update(make_trainer, name, caplog):
    trainer = make_trainer(Ranged(), stop_on=[name], save_strategy="no")
    with pytest.raises(ValueError, match=f"stop_on names {name}, which the first rollout does not measure: the reward"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(Ranged(), stop_on=["all"], num_train_epochs=1, watch_limits={"kl": None}, save_strategy="no").train()
    assert f"stop_on all does not stop on {name}: the reward" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"share_noise": "around", "train_steps": ["auto:2"], "gradient_accumulation_steps": 8},
        {"share_noise": "before", "timestep_fraction": 0.5, "gradient_accumulation_steps": 4},
    ],
    ids=["auto", "fraction"],
)
def test_noise_that_is_shared_in_some_rollouts_only_is_no_loss_of_diversity(make_trainer, settings, monkeypatch):
    """Nothing is learned here. What is shared depends on the steps that are trained, which are not always the same."""
    monkeypatch.setattr("rl.step_probe.OPTIMISM", 50.0)  # so that windows do take turns in so few rollouts
    trainer = make_trainer(
        **settings, num_inference_steps=5, generation_batch_size=16, learning_rate=1e-9, num_train_epochs=5,
        save_strategy="no",
    )  # fmt: skip
    trainer.train()
    curve = logged(trainer, "watch/diversity")
    assert len(curve) == 5
    assert all(0.75 < value < 1.33 for value in curve)
    kinds = {name for name in trainer.watch.state()["start"] if name.startswith("diversity")}
    assert len(kinds) > 1
