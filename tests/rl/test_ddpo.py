"""Whole rollouts and updates of the trainer, on a tiny pipeline."""

from types import SimpleNamespace

import pytest
import torch

from reward.feedback import Reward
from rl.advantages import group_advantages
from tests.rl.outcomes import assert_same, logged, lora
from tests.rl.toy_rewards import Plain, Redness


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


def test_emptying_pictures_are_warned_about(make_trainer, caplog):
    trainer = make_trainer(num_train_epochs=2)
    trainer.watch.load_state({"start": {"drawn": 100.0}})
    trainer.train()
    assert "learning to draw less" in caplog.text
