"""Sampling at the base model's cost: the LoRA folded into the weights where nothing is learned from the step."""

import pytest
import torch

from rl.keyed import keyed_noise
from rl.rollout import sample
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS
from tests.rl.test_adapter import KINDS, kinds, load, trained


def predict(policy):
    conditioning = policy.encode(PROMPTS[:2])
    latents = keyed_noise(1, 0, range(2), policy.latent_shape)
    return policy.predict(policy.network, latents, torch.tensor([500, 20]), conditioning)


def count_adapted(policy):
    """How many layers ran with their LoRA beside them; a list that is filled as they run."""
    ran = []
    for layer in policy.network.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["default"].register_forward_hook(lambda *_: ran.append(1))
    return ran


@torch.no_grad()
@kinds
def test_folded_is_the_same_function_and_leaves_no_trace(pipeline_folder, kind):
    policy = trained(load(pipeline_folder, **kind))
    weights = {name: weight.clone() for name, weight in policy.network.state_dict().items()}
    apart = predict(policy)
    with policy.folded():
        together = predict(policy)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(predict(policy), apart)
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.network.state_dict().items())


@torch.no_grad()
def test_folded_runs_no_lora_and_dora_is_not_folded(pipeline_folder):
    for kind, folds in (("alpha", True), ("pissa", True), ("dora", False)):
        policy = trained(load(pipeline_folder, **KINDS[kind]))
        ran = count_adapted(policy)
        with policy.folded():
            predict(policy)
        assert bool(ran) != folds, kind


@torch.no_grad()
def test_what_bfloat16_would_round_away_is_not_folded(pipeline_folder):
    policy = load(pipeline_folder, dtype=torch.bfloat16)
    ran = count_adapted(policy)
    with policy.folded():
        predict(policy)
    assert ran
    policy = load(pipeline_folder)
    ran = count_adapted(policy)
    with torch.autocast("cpu", torch.bfloat16), policy.folded():
        predict(policy)
    assert ran


@torch.no_grad()
def test_reference_is_not_folded_into(pipeline_folder):
    policy = trained(load(pipeline_folder))
    with policy.reference():
        base = predict(policy)
        with policy.folded():
            assert torch.equal(predict(policy), base)
        assert torch.equal(predict(policy), base)


def test_weights_come_back_after_an_error(pipeline_folder):
    policy = trained(load(pipeline_folder))
    weights = {name: weight.clone() for name, weight in policy.network.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), policy.folded():
        raise RuntimeError("stop")
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.network.state_dict().items())
    assert not any(layer.disable_adapters for layer in policy.network.modules() if hasattr(layer, "lora_A"))


def test_trained_steps_alone_are_computed_apart(pipeline_folder):
    """What the update computes again must be computed alike, or the ratio of the first pass would not be 1."""
    policy = trained(load(pipeline_folder))
    ran = count_adapted(policy)
    layers = sum(hasattr(layer, "lora_A") for layer in policy.network.modules())
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 4, eta=1.0)
    noise = keyed_noise(0, 0, range(2), (5, *policy.latent_shape))
    whole = sample(policy, policy.network, PROMPTS[:2], noise, schedule, train_steps=[1, 2])
    assert len(ran) == 2 * layers
    ran.clear()
    drawn = sample(policy, policy.network, PROMPTS[:2], noise, schedule)
    assert not ran
    torch.testing.assert_close(drawn.final_latents, whole.final_latents, rtol=1e-4, atol=1e-4)
