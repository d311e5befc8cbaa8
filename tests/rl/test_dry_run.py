import time

import pytest
import torch

from reward.feedback import Reward
from rl.dry_run import measure
from rl.policy import StableDiffusionPolicy


def test_what_a_run_would_cost(make_trainer):
    trainer = make_trainer(num_train_epochs=5, num_iterations=2)
    before = [weight.detach().clone() for weight in trainer.trained_weights()]
    costs = measure(trainer)
    assert costs["rows_per_rollout"] == 8 * 2
    assert costs["pictures"] == 5 * 8
    assert costs["updates_per_rollout"] == 2
    assert costs["trained_weights"] == sum(weight.numel() for weight in before)
    assert costs["gradients_and_optimizer_mib"] == pytest.approx(12 * costs["trained_weights"] / 2**20)
    assert costs["weights_vae_mib"] == pytest.approx(
        sum(weight.numel() * 4 for weight in trainer.policy.pipeline.vae.parameters()) / 2**20
    )
    assert costs["buffer_mib"] == pytest.approx(8 * 2 * (2 * 4 + 1) * 8 * 8 * 4 / 2**20)
    phases = [value for name, value in costs.items() if name.startswith("rollout_") and name.endswith("_seconds")]
    assert costs["seconds"] == pytest.approx(5 * sum(phases))
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.trained_weights(), strict=True))


def test_time_is_that_of_all_batches_and_micro_batches(make_trainer, monkeypatch):
    """By a clock that moves where it is told to: a second for a picture that is rewarded, ten for a micro-batch."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(images, prompts):
        now[0] += len(images)
        return Reward(images.mean((1, 2, 3)))

    trainer = make_trainer(slow, num_train_epochs=5, num_iterations=2)
    compute_loss = trainer.compute_loss

    def slow_loss(*args):
        now[0] += 10
        return compute_loss(*args)

    monkeypatch.setattr(trainer, "compute_loss", slow_loss)
    costs = measure(trainer)
    assert costs["rollout_reward_seconds"] == 8
    assert costs["rollout_update_seconds"] == 10 * 2 * 2 * 2  # halves of the pictures, steps, times over
    assert costs["seconds"] == 5 * (8 + 80)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_is_computed_again_is_what_was(make_trainer, tune):
    """In the backward pass of checkpointed blocks, with a LoRA's inputs dropped as they were."""
    dropout = {"lora_dropout": 0.5} if tune == "lora" else {"learning_rate": 1e-3}
    every, few = (
        measure(make_trainer(activation_checkpointing=again, tune=tune, **dropout))["activations_mib"]
        for again in (False, True)
    )
    assert 0 < few < every


def test_the_watched_reward_costs_too(make_trainer):
    asked = []

    def watching(images, prompts):
        asked.append(len(images))
        return Reward(images.mean((1, 2, 3)))

    measure(make_trainer(held_out=watching))
    assert sum(asked) == 2 * 4  # the batch, twice


def test_what_a_group_shares_is_taken_off(make_trainer, monkeypatch):
    """Of eight pictures of two prompts the network sees two, up to the trained step and in its update."""
    asked = []
    real = StableDiffusionPolicy._predict_each

    def noting(policy, network, latents, *args):
        asked.append(len(latents))
        return real(policy, network, latents, *args)

    monkeypatch.setattr(StableDiffusionPolicy, "_predict_each", noting)
    settings = {"num_inference_steps": 5, "train_steps": ["1:3"], "per_device_train_batch_size": 8}
    settings |= {"gradient_accumulation_steps": 2}
    measure(make_trainer(share_noise="around", **settings))
    assert asked == [2, 2, 8, 8, 8, 2, 8] * 2  # sampling; updates of the first and the last trained step
    asked.clear()
    measure(make_trainer(share_noise="none", **settings))
    assert set(asked) == {8}


def test_activations_grow_with_the_batch(make_trainer):
    small, large = (
        measure(make_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size))
        for size in (2, 4)
    )
    assert large["activations_mib"] == pytest.approx(2 * small["activations_mib"], rel=0.2)
    assert small["activations_mib"] > 0.1


def test_an_update_is_of_a_whole_micro_batch_whatever_is_sampled_at_once(make_trainer):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    whole, small = (measure(make_trainer(per_device_rollout_batch_size=size, **settings)) for size in (8, 2))
    assert small["activations_mib"] == pytest.approx(whole["activations_mib"], rel=0.01)


def test_activation_checkpointing_is_counted(make_trainer):
    """What blocks are computed again from, which is not nothing."""
    whole, again = (measure(make_trainer(activation_checkpointing=wanted)) for wanted in (False, True))
    assert 0.05 * whole["activations_mib"] < again["activations_mib"] < 0.7 * whole["activations_mib"]
