"""LoRAs on the text encoders beside the U-Net's."""

import copy
import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from rl.adapter import LORA_WEIGHTS, AdapterSettings
from rl.dry_run import measure
from rl.memory import MemorySettings
from rl.pipelines import load_pipeline
from rl.policy import StableDiffusionPolicy
from rl.sde import kl_map, step_mean
from tests.rl.conftest import PROMPTS
from tests.rl.test_adapter import KINDS, assert_close, latents_by_diffusers, latents_of, load, trained

TEXT = {"train_text_encoder": True}


def text_weights(policy):
    return {
        name: weight
        for name, weight in policy.network.named_parameters()
        if weight.requires_grad and name.startswith("text_encoder")
    }


@pytest.mark.parametrize(("family", "kind"), [("sd", "alpha"), ("sd", "gaussian"), ("xl", "rslora"), ("xl", "pissa")])
def test_what_comes_out_loads_in_plain_diffusers(pipeline_folder, xl_folder, tmp_path, family, kind):
    """And back to the bit; what it does to the words shows."""
    folder = {"sd": pipeline_folder, "xl": xl_folder}[family]
    policy = load(folder, **TEXT, **KINDS[kind])
    base = latents_by_diffusers(load_pipeline(folder, torch.float32), policy)
    assert_close(latents_of(policy), base)  # untrained, it changes nothing
    with trained(policy).reference():
        assert_close(latents_of(policy), base)
    policy.save_adapter(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(tmp_path))
    ours = latents_of(policy)
    assert_close(ours, latents_by_diffusers(pipe, policy))

    other = load(folder, **TEXT, **{**KINDS[kind], "seed": 6})
    other.load_adapter(tmp_path)
    weights = policy.network.state_dict()
    for name, weight in other.network.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    with torch.no_grad():
        for weight in text_weights(policy).values():
            weight += 0.2
    assert (latents_of(policy) - ours).abs().max() > 0.01


def test_names_are_those_that_older_libraries_know(pipeline_folder, tmp_path):
    load(pipeline_folder, **TEXT).save_adapter(tmp_path)
    names = load_file(tmp_path / LORA_WEIGHTS)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_lora_of_other_parts_does_not_come_back(pipeline_folder, tmp_path):
    for mine, theirs in (({}, TEXT), (TEXT, {})):
        load(pipeline_folder, **theirs).save_adapter(tmp_path)
        with pytest.raises(ValueError, match="train_text_encoder the values it was trained with"):
            load(pipeline_folder, **mine).load_adapter(tmp_path)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_weight_is_used_and_gradients_are_those_of_the_loss(pipeline_folder, xl_folder, guidance_scale):
    """Against differences of the loss along a random direction, in float64. A weight that is not used would have no
    gradient, and DDP would wait for it; of XL, nothing is read from behind the first encoder's last layer."""
    for folder in (pipeline_folder, xl_folder):
        policy = trained(load(folder, **TEXT))
        policy.network.double()
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).double()
        weights = list(text_weights(policy).values())

        def loss(policy=policy, latents=latents):
            conditioning = policy.encode(PROMPTS[:2])
            timesteps = torch.tensor([500, 20])
            return policy.predict(policy.network, latents, timesteps, conditioning, guidance_scale).square().mean()

        everything = [weight for weight in policy.network.parameters() if weight.requires_grad]
        loss().backward()
        assert all(weight.grad is not None for weight in everything)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(weight.shape, generator=generator).double() for weight in weights]
        slope = sum((weight.grad * way).sum() for weight, way in zip(weights, directions, strict=True))
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for weight, way in zip(weights, directions, strict=True):
                    weight += step * way
                values.append(loss())
        assert slope.abs() > 1e-4
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-3, atol=1e-9)


def test_seed_decides_the_initial_weights(pipeline_folder):
    """And the U-Net's are those of a run that trains it alone."""
    first, again, other = (load(pipeline_folder, **TEXT, seed=seed) for seed in (5, 5, 6))
    alone = load(pipeline_folder)
    a, b, c = (torch.cat([weight.flatten() for weight in text_weights(one).values()]) for one in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    theirs = dict(alone.network.named_parameters())
    for name, weight in first.network.named_parameters():
        if name.startswith("unet."):
            assert torch.equal(weight, theirs[name.removeprefix("unet.")])


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
def test_ratio_is_1_at_first_and_both_parts_learn(make_trainer, changes):
    trainer = make_trainer(**TEXT, **changes, num_train_epochs=1, learning_rate=0.01, num_iterations=2)
    before = {name: weight.detach().clone() for name, weight in trainer.policy.network.named_parameters()}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["ratio_deviation"] == 0
    assert log[-1]["ratio_deviation"] > 0
    moved = {
        name.partition(".")[0]
        for name, weight in trainer.policy.network.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert moved == {"unet", "text_encoder"}


def test_text_encoder_is_never_in_training_mode(pipeline_folder):
    """What it dropped in the update would not have been dropped in the rollout."""
    policy = load(pipeline_folder, **TEXT)
    policy.network.train()
    assert policy.pipeline.unet.training
    assert not any(module.training for module in policy.pipeline.text_encoder.modules())


def test_kl_is_to_the_base_model_with_its_own_text_encoder(make_trainer, pipeline_folder):
    """Against a second pipeline, where only the words are trained."""
    trainer = make_trainer(**TEXT, beta=0.1)
    policy, schedule = trainer.policy, trainer.schedule
    with torch.no_grad():
        for name, weight in text_weights(policy).items():
            weight.add_(0.3 * ("lora_B" in name))
    inputs = next(trainer.rollout(0))
    trainer.compute_loss(policy.network, inputs)
    latents, prompts = inputs["latents"], inputs["prompts"]
    step = torch.full((len(latents),), inputs["step"])
    base = load_pipeline(pipeline_folder, torch.float32)
    means = []
    with torch.no_grad():
        for pipeline in (base, policy.pipeline):
            embeds, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, False)
            output = base.unet(latents, schedule.timesteps[step], embeds).sample
            mean, std = step_mean(output, latents, step, schedule)
            means.append(mean)
    expected = kl_map(means[1], means[0], std).mean()
    assert expected > 1e-6
    torch.testing.assert_close(trainer._metrics["kl"][-1], expected, rtol=1e-3, atol=1e-9)


AUTO = {"train_steps": ["auto:1"], "generation_batch_size": 12, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize("changes", [{"ema_decay": 0.5}, AUTO], ids=["ema", "auto"])
def test_resumed_run_ends_with_the_same_bits(make_trainer, tmp_path, changes):
    settings = {**TEXT, **changes, "num_train_epochs": 3, "learning_rate": 0.01, "save_strategy": "epoch"}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    whole.save_model()
    place = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[0]
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **settings, resume_from_checkpoint=str(place))
    resumed.train(resume_from_checkpoint=str(place))
    resumed.save_model()
    first, second = (load_file(tmp_path / name / LORA_WEIGHTS) for name in ("whole", "resumed"))
    assert any(name.startswith("text_encoder.") for name in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_starts_from_a_lora_of_both(pipeline_folder, tmp_path):
    trained(load(pipeline_folder, **TEXT, lora_alpha=4.0)).save_adapter(tmp_path / "both")
    policy = load(pipeline_folder, **TEXT, init_adapter=str(tmp_path / "both"), lora_rank=8)
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    base = latents_by_diffusers(pipe, policy)
    pipe.load_lora_weights(str(tmp_path / "both"))
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))
    with policy.reference():
        assert_close(latents_of(policy), base)
    policy.save_adapter(tmp_path / "again")
    first, again = (load_file(tmp_path / name / LORA_WEIGHTS) for name in ("both", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_lora_of_the_unet_alone_gets_a_fresh_one_for_the_words(pipeline_folder, tmp_path):
    first = trained(load(pipeline_folder))
    first.save_adapter(tmp_path)
    policy = load(pipeline_folder, **TEXT, init_adapter=str(tmp_path), lora_rank=8)
    assert_close(latents_of(policy), latents_of(first))
    assert text_weights(policy)


def test_frozen_weights_may_be_missing_and_no_others(pipeline_folder):
    """As of DeepSpeed's checkpoints."""
    network = StableDiffusionPolicy.load(pipeline_folder, train_text_encoder=True).network
    trained = {name: torch.ones_like(weight) for name, weight in network.named_parameters() if weight.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"unet", "text_encoder"}
    network.load_state_dict(trained)
    assert all((weight == 1).all() for name, weight in network.named_parameters() if name in trained)
    lost = dict(list(trained.items())[1:])
    for wrong in (lost, trained | {"unknown": torch.ones(1)}):
        with pytest.raises(RuntimeError, match=r"do not fit the LoRAs: (unet\.\S+|unknown) missing or unknown"):
            network.load_state_dict(wrong)
        network.load_state_dict(wrong, strict=False)


def test_what_cannot_be_is_refused(pipeline_folder, tmp_path, make_args, caplog):
    with pytest.raises(ValueError, match=r"with tune full there is none; set tune to lora, or train_text_encoder to"):
        AdapterSettings(tune="full", train_text_encoder=True)
    with pytest.raises(ValueError, match=r"use_dora with train_text_encoder .*magnitudes would be lost"):
        AdapterSettings(use_dora=True, train_text_encoder=True)
    with pytest.raises(ValueError, match="no layer of the text_encoder is named like any of text_lora_target_modules"):
        load(pipeline_folder, **TEXT, text_lora_target_modules=["to_q"])
    with pytest.raises(ValueError, match="text_lora_target_modules is empty"):
        AdapterSettings(text_lora_target_modules=[])
    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=r"changes a text encoder too .*set train_text_encoder to true"):
        load(pipeline_folder, init_adapter=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        make_args(text_lora_target_modules=["q_proj"])
    assert "text_lora_target_modules=['q_proj'] is ignored: train_text_encoder is false" in caplog.text


def test_trained_text_encoders_are_not_offloaded(xl_folder):
    device = torch.device("meta")
    settings = {"lora_rank": 2, "lora_target_modules": ["to_q"], "memory": MemorySettings(offload=True)}
    pipeline = StableDiffusionPolicy.load(xl_folder, **settings, **TEXT).to(device).pipeline
    assert pipeline.vae.device == torch.device("cpu")
    assert pipeline.text_encoder.device == pipeline.text_encoder_2.device == device


def test_lora_is_float32_on_text_encoders_that_are_not(xl_folder):
    policy = load(xl_folder, **TEXT, dtype=torch.bfloat16)
    dtypes = {(weight.requires_grad, weight.dtype) for weight in policy.network.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert latents_of(trained(policy)).isfinite().all()


def test_dry_run_counts_them(make_trainer):
    costs = measure(make_trainer(**TEXT))
    assert costs["trained_weights_of_text_encoders"] == 4 * 2 * (16 + 16)  # four layers of 16 x 16, rank 2


def test_base_prompts_are_remembered_and_others_are_not(pipeline_folder):
    policy = load(pipeline_folder, **TEXT)
    before = copy.deepcopy(policy.encode(PROMPTS[:2]).embeds.detach())
    with policy.reference():
        base = policy.encode(PROMPTS[:2])
    trained(policy)
    assert not torch.equal(policy.encode(PROMPTS[:2]).embeds, before)
    with policy.reference():
        assert torch.equal(policy.encode(PROMPTS[:2]).embeds, base.embeds)
    assert not base.embeds.requires_grad
