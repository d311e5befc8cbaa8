"""Every family of pipelines: what ours draws is what diffusers draws."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import rl.policy
from rl.keyed import keyed_noise
from rl.pipelines import load_pipeline, load_scheduler, picture_size
from rl.policy import PictureSize, StableDiffusionPolicy
from rl.rollout import sample
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS, put_in_hub_cache

FAMILIES = ["pipeline_folder", "sd1_folder", "sd2_folder", "xl_folder", "xl_folder_with_empty_prompt"]


def load(folder, **changes):
    return StableDiffusionPolicy.load(folder, **{"lora_rank": 2, "seed": 5, **changes})


def plain(folder):
    """The pipeline by diffusers alone, with its own noise schedule in DDIM."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def any_folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("any_folder", FAMILIES, indirect=True)
def test_pictures_are_those_of_the_pipeline_itself(any_folder, guidance):
    policy = load(any_folder)
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 5, eta=0.0)
    noise = keyed_noise(0, 0, range(2), (6, *policy.latent_shape))
    ours = sample(policy, policy.network, PROMPTS[:2], noise, schedule, guidance_scale=guidance)
    pipe = plain(any_folder)
    settings = {"num_inference_steps": 5, "guidance_scale": guidance, "eta": 0.0, "latents": noise[:, 0]}
    latents = pipe(PROMPTS[:2], output_type="latent", **settings).images
    pictures = pipe(PROMPTS[:2], output_type="pt", **settings).images
    torch.testing.assert_close(ours.final_latents, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.decode(ours.final_latents), pictures, rtol=1e-4, atol=1e-4)


def test_schedule_that_ends_in_pure_noise_starts_there(sd2_folder):
    policy = load(sd2_folder)
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 5, eta=1.0)
    assert schedule.timesteps[0] == 999
    assert schedule.alphas[0] == 0
    noise = keyed_noise(0, 0, range(2), (6, *policy.latent_shape))
    trajectory = sample(policy, policy.network, PROMPTS[:2], noise, schedule, train_steps=(0, 1))
    assert trajectory.log_probs.isfinite().all()


def test_noise_cannot_be_predicted_where_there_is_nothing_else():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    with pytest.raises(ValueError, match=r"prediction_type epsilon.*start_timestep"):
        make_schedule(scheduler, 5, eta=1.0)
    assert make_schedule(ddim_scheduler(scheduler, start_timestep=899), 5, eta=1.0).alphas[0] > 0


@pytest.mark.parametrize("negative", [None, ""])
def test_xl_without_a_prompt_is_what_the_pipeline_says(xl_folder, xl_folder_with_empty_prompt, negative):
    """A negative prompt that is empty is encoded; one that is absent is zeros, if the pipeline forces them."""
    folder = xl_folder if negative is None else xl_folder_with_empty_prompt
    policy = load(folder)
    nothing = policy._without_prompt(policy.encode(PROMPTS[:2]))
    _, embeds, _, pooled = plain(folder).encode_prompt(PROMPTS[:2], device="cpu", negative_prompt=negative)
    torch.testing.assert_close(nothing.embeds, embeds)
    torch.testing.assert_close(nothing.pooled, pooled)
    assert bool((nothing.embeds == 0).all()) == (negative is None)


def test_xl_is_told_sizes(xl_folder):
    sizes = {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (20, 24)}
    policy = load(xl_folder, size=PictureSize(**sizes))
    assert policy.encode(PROMPTS[:1]).time_ids.tolist() == [[64, 48, 3, 5, 20, 24]]
    assert load(xl_folder, resolution=32).encode(PROMPTS[:2]).time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 3, eta=0.0)
    noise = keyed_noise(0, 0, range(2), (4, *policy.latent_shape))
    ours = sample(policy, policy.network, PROMPTS[:2], noise, schedule, guidance_scale=2.0)
    theirs = plain(xl_folder)(
        PROMPTS[:2], num_inference_steps=3, guidance_scale=2.0, latents=noise[:, 0], output_type="latent", **sizes
    )
    torch.testing.assert_close(ours.final_latents, theirs.images, rtol=1e-4, atol=1e-4)


def test_sizes_are_checked_and_mean_something_to_xl_only(pipeline_folder, caplog):
    with pytest.raises(ValueError, match=r"original_size is \[64\]; it is two numbers"):
        PictureSize(original_size=[64])
    load(pipeline_folder)
    assert not caplog.text
    assert load(pipeline_folder, size=PictureSize(target_size=(8, 8))).encode(PROMPTS[:1]).time_ids is None
    assert "ignored" in caplog.text


def test_only_the_last_prompts_are_remembered(pipeline_folder, monkeypatch):
    monkeypatch.setattr(rl.policy, "REMEMBERED_PROMPTS", 2)
    policy = load(pipeline_folder)
    whole = policy.encode(PROMPTS).embeds  # more than are remembered, at once
    assert list(policy._embeddings) == PROMPTS[-2:]
    policy.encode([PROMPTS[-2]])
    policy.encode([PROMPTS[0]])
    assert list(policy._embeddings) == [PROMPTS[-2], PROMPTS[0]]
    assert torch.equal(policy.encode(PROMPTS[::-1]).embeds, whole.flip(0))  # whatever its company, to the bit


def test_vae_of_xl_that_overflows_in_float16_is_float32(xl_folder, pipeline_folder):
    assert load_pipeline(xl_folder, torch.float16).vae.dtype == torch.float32
    assert load_pipeline(xl_folder, torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_pipeline(pipeline_folder, torch.float16).vae.dtype == torch.float16


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2", "unet"])
def test_part_of_xl_that_is_missing_is_named(xl_folder, tmp_path, part):
    shutil.copytree(xl_folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / part)
    with pytest.raises(ValueError, match=f"lacks its part `{part}`"):
        load(str(tmp_path / "broken"))


def test_other_families_are_named_with_those_that_work(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"is a FluxPipeline; .*StableDiffusionPipeline .*2\.x.*StableDiffusionXL"):
        load(str(tmp_path))


def test_scheduler_on_the_hub_is_read_without_the_models(pipeline_folder, tmp_path, monkeypatch):
    files = ("model_index.json", "scheduler/scheduler_config.json")
    put_in_hub_cache(monkeypatch, tmp_path / "hub", "some/pipeline", pipeline_folder, files)
    here, there = load_scheduler(pipeline_folder), load_scheduler("some/pipeline")
    assert type(here) is type(there)
    assert here.config == there.config

    message = rf"cannot read model_index.json of the pipeline some/other: .*{tmp_path / 'hub'}.*HF_HUB_OFFLINE"
    for load_any in (load_scheduler, load):
        with pytest.raises(ValueError, match=message):
            load_any("some/other")


def test_family_on_the_hub_is_known_from_its_index(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    put_in_hub_cache(monkeypatch, tmp_path / "hub", "some/flux", tmp_path, ["model_index.json"])
    with pytest.raises(ValueError, match="some/flux is a FluxPipeline"):
        load_scheduler("some/flux")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("in_channels", 9, "takes 9 channels and returns 4"), ("time_cond_proj_dim", 8, "told the guidance scale")],
)
def test_networks_for_other_tasks_are_refused(pipeline_folder, tmp_path, key, value, message):
    shutil.copytree(pipeline_folder, tmp_path / "other")
    file = Path(tmp_path / "other/unet/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "other"))


def test_the_grey_picture_is_as_large_as_the_policys(pipeline_folder, xl_folder):
    for folder in (pipeline_folder, xl_folder):
        policy = StableDiffusionPolicy.load(folder)
        sides = tuple(side * policy.pipeline.vae_scale_factor for side in policy.latent_shape[1:])
        assert picture_size(folder, None) == sides
        assert picture_size(folder, 32) == (32, 32)
