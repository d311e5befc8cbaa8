import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from rl.keyed import keyed_noise
from rl.policy import StableDiffusionPolicy
from rl.rollout import sample
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS


def load(folder, **changes):
    return StableDiffusionPolicy.load(folder, **{"lora_rank": 2, "lora_alpha": 8.0, "seed": 5, **changes})


def trained(policy):
    """Give the LoRA weights that show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_only_the_lora_is_trainable_and_it_sits_on_attention_and_convolutions(pipeline_folder):
    policy = load(pipeline_folder)
    names = [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert any("to_q" in name for name in names)
    assert any("conv1" in name for name in names)


def test_initial_weights_depend_on_the_seed_only(pipeline_folder):
    def weights(seed, disturb):
        torch.manual_seed(disturb)
        policy = load(pipeline_folder, seed=seed)
        return torch.cat([parameter.flatten() for parameter in policy.network.parameters() if parameter.requires_grad])

    state = torch.random.get_rng_state()
    first = weights(1, 0)
    assert torch.equal(first, weights(1, 99))
    assert not torch.equal(first, weights(2, 0))
    torch.random.set_rng_state(state)


def test_lora_loads_in_plain_diffusers_and_draws_the_same_pictures(pipeline_folder, tmp_path):
    """alpha is four times the rank: without the saved metadata diffusers would take it for the rank."""
    policy = trained(load(pipeline_folder))
    scheduler = ddim_scheduler(policy.scheduler)
    schedule = make_schedule(scheduler, 4, 1.0)
    noise = keyed_noise(0, 0, range(2), (5, *policy.latent_shape))
    ours = policy.decode(sample(policy, policy.network, PROMPTS[:2], noise, schedule).final_latents)
    with policy.reference():
        base = policy.decode(sample(policy, policy.network, PROMPTS[:2], noise, schedule).final_latents)
    policy.save_adapter(tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path))
    steps = iter(noise[:, 1:].unbind(dim=1))
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x, **kwargs: step(
        output, t, x, eta=1.0, variance_noise=next(steps), return_dict=False
    )
    theirs = pipe(PROMPTS[:2], num_inference_steps=4, guidance_scale=1.0, latents=noise[:, 0], output_type="pt").images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.01  # the LoRA does something


def test_adapter_comes_back_to_the_bit(pipeline_folder, tmp_path):
    policy = trained(load(pipeline_folder))
    policy.save_adapter(tmp_path)
    other = load(pipeline_folder, seed=6)
    other.load_adapter(tmp_path)
    for mine, theirs in zip(policy.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="another rank"):
        load(pipeline_folder, lora_rank=3).load_adapter(tmp_path)
    with pytest.raises(ValueError, match="holds no pytorch_lora_weights"):
        other.load_adapter(tmp_path / "nowhere")


def test_reference_is_the_base_model(pipeline_folder):
    policy = trained(load(pipeline_folder))
    base = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    latents, timesteps = torch.randn(2, *policy.latent_shape), torch.tensor([500, 20])
    embeds = policy.encode(PROMPTS[:2])
    with torch.no_grad(), policy.reference():
        reference = policy.predict(policy.network, latents, timesteps, embeds)
        expected = base.unet(latents, timesteps, encoder_hidden_states=embeds.embeds).sample
        assert torch.equal(reference, expected)
    with torch.no_grad():
        assert not torch.equal(policy.predict(policy.network, latents, timesteps, embeds), expected)


def test_prompts_are_encoded_once_and_as_diffusers_does(pipeline_folder):
    policy = load(pipeline_folder)
    ours = policy.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]]).embeds
    theirs, _ = policy.pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, False)
    torch.testing.assert_close(ours[:2], theirs)
    assert torch.equal(ours[0], ours[2])
    policy.pipeline.text_encoder = None  # would fail if it were needed again
    policy.encode(PROMPTS[:2])


def test_many_pictures_are_decoded_in_parts_as_diffusers_decodes_them_together(pipeline_folder, monkeypatch):
    """The parts fit a CPU's cache; a picture that is larger goes alone."""
    policy = load(pipeline_folder)
    vae, seen = policy.pipeline.vae, []
    latents = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    together = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).detach()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: seen.append(len(part)) or decode(part))
    height, width = together.shape[2:]
    for pixels, parts in ((2 * height * width, [2, 2, 1]), (height * width - 1, [1] * 5)):
        monkeypatch.setattr("rl.policy.CPU_DECODED_PIXELS", pixels)
        assert torch.allclose(policy.decode(latents), together, atol=1e-5)
        assert seen == parts
        seen.clear()


def test_resolution_must_fit(pipeline_folder):
    assert load(pipeline_folder, resolution=32).latent_shape == (4, 16, 16)
    with pytest.raises(ValueError, match="multiple of 4"):
        load(pipeline_folder, resolution=30)


def test_targets_that_match_nothing(pipeline_folder, caplog):
    with pytest.raises(ValueError, match="no layer of the U-Net"):
        load(pipeline_folder, lora_target_modules=["nothing"])
    load(pipeline_folder, lora_target_modules=["to_q", "nothing"])
    assert "nothing" in caplog.text


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part_is_named(pipeline_folder, tmp_path, part):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    shutil.rmtree(broken / part)
    with pytest.raises(ValueError, match=f"lacks its part `{part}`"):
        load(str(broken))


@pytest.fixture
def copied(pipeline_folder, tmp_path):
    return Path(shutil.copytree(pipeline_folder, tmp_path / "broken"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_and_torn_weights_are_named(copied, part):
    (weights,) = (copied / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{weights} is no whole safetensors file"):
        load(str(copied))
    weights.unlink()
    with pytest.raises(ValueError, match=f"lacks the weights of its part `{part}`: .* holds no weights"):
        load(str(copied))
    (copied / part / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"holds only pytorch_model.bin; what is wanted is .*\.safetensors"):
        load(str(copied))


def stored(part):
    (file,) = part.glob("*.safetensors")
    return file, load_file(file)


def test_weights_that_are_not_there_are_not_drawn_at_random(copied):
    for part in ("text_encoder", "unet", "vae"):
        file, weights = stored(copied / part)
        lost = sorted(weights)[0]
        save_file({name: weight for name, weight in weights.items() if name != lost}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"lack weights of its part `{part}`: {lost}"):
            load(str(copied))
        save_file(weights, file, {"format": "pt"})
    load(str(copied))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_that_are_no_numbers_are_named(copied, part):
    file, weights = stored(copied / part)
    name = sorted(weights)[0]
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"weights of the part `{part}` .* are not finite: {name}"):
        load(str(copied))


def test_files_that_nobody_reads_may_be_what_they_like(copied):
    for part in ("text_encoder", "unet", "vae"):
        file, _ = stored(copied / part)
        file.with_suffix(".fp16.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        (copied / part / "pytorch_model.bin").write_bytes(b"pickle")
    load(str(copied))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_files_of_settings_that_hold_none_are_named(copied, file):
    (copied / file).write_text("[1]")
    with pytest.raises(ValueError, match=f"{file} is JSON, but not a mapping"):
        load(str(copied))


def test_tokenizer_without_a_vocabulary_is_named(copied):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copied / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"lacks the vocabulary of its part `tokenizer`: .* neither tokenizer.json"):
        load(str(copied))
    (copied / "tokenizer/vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (copied / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocabulary of the part `tokenizer` .* is empty but for special tokens"):
        load(str(copied))


def test_what_is_no_pipeline(pipeline_folder, tmp_path):
    with pytest.raises(ValueError, match="no pipeline folder"):
        load("./nowhere")
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load(str(tmp_path))
    Path(tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="FluxPipeline"):
        load(str(tmp_path))
