"""Tiny Stable Diffusion pipelines with random weights: everything real ones have, in 16 x 16 pixels."""

import copy
import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "of", "two"]
PROMPTS = ["a red circle", "a blue square", "two green star", "a red star left of a blue circle", "a green square"]


def make_tokenizer(folder):
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}</w>" not in vocabulary]
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=16)


def text_config(tokenizer, **changes):
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "projection_dim": 16, "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    return CLIPTextConfig(**{**settings, **changes})


def make_unet(**changes):
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **changes})


def make_vae(**changes):
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16, **changes,
    )  # fmt: skip


def make_pipeline(folder, scheduler=None, **unet):
    """Stable Diffusion 1.x, or, by what it is given, 2.x."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(text_config(tokenizer))
    pipeline = StableDiffusionPipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, unet=make_unet(**unet), vae=make_vae(),
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


def make_xl_pipeline(folder, **settings):
    """Stable Diffusion XL: noise prediction, two text encoders of unlike width, a pooled embedding and six numbers."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(text_config(tokenizer, num_hidden_layers=2)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(tokenizer, num_hidden_layers=2, hidden_size=24, projection_dim=20, hidden_act="gelu")
        ),
        tokenizer_2=tokenizer,
        unet=make_unet(
            cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20, use_linear_projection=True,
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
        ),
        vae=make_vae(scaling_factor=0.13, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.9, 1.1, 1.2]),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False, **settings,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


def put_in_hub_cache(monkeypatch, cache, name, folder, files):
    """Some `files` of a pipeline folder as the hub's cache has what was fetched; the hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit, place = "0" * 40, cache / f"models--{name.replace('/', '--')}"
    for file in files:
        (place / "snapshots" / commit / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{folder}/{file}", place / "snapshots" / commit / file)
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)


@contextmanager
def full_disk(room=2000):
    """No file may grow beyond `room` bytes: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    """Predicts the noise, with the scheduler that Stable Diffusion 1.5 comes with."""
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return make_pipeline(tmp_path_factory.mktemp("sd1"), scheduler)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory):
    """v-prediction with a noise schedule that ends in pure noise, and linear projections."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    return make_pipeline(tmp_path_factory.mktemp("sd2"), scheduler, **unet)


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory):
    return make_xl_pipeline(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="session")
def xl_folder_with_empty_prompt(tmp_path_factory):
    """Its unconditional branch is the empty prompt, not zeros."""
    return make_xl_pipeline(tmp_path_factory.mktemp("xl_empty"), force_zeros_for_empty_prompt=False)


def args_of(output_dir, **changes):
    """DDPOConfig of a run of seconds; keywords override."""
    from rl.ddpo import DDPOConfig

    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "num_train_epochs": 2, "num_inference_steps": 3,
        "generation_batch_size": 8, "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "lora_rank": 2, "lora_alpha": 4.0, "disable_tqdm": True,
        "report_to": [], "seed": 3, "num_log_images": 0, "train_steps": ["0:2"],
    }  # fmt: skip
    return DDPOConfig(**{**settings, **changes})


@cache
def _loaded(*args):
    from rl.pipelines import load_pipeline

    return load_pipeline(*args)


def trainer_of(pipeline, args, reward=None, held_out=None, eval_on=None):
    """Its policy is a copy of a pipeline that is loaded once: that takes longer than many a test's rollout."""
    from rl.adapter import AdapterSettings
    from rl.ddpo import DDPOTrainer
    from rl.policy import StableDiffusionPolicy
    from tests.rl.toy_rewards import Redness

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rl.policy.load_pipeline", lambda *args: copy.deepcopy(_loaded(*args)))
        policy = StableDiffusionPolicy.load(
            pipeline, seed=args.seed, keep_reference=args.beta > 0, **asdict(args.part(AdapterSettings))
        )
    return DDPOTrainer(policy, reward or Redness(), args, PROMPTS, held_out=held_out, eval_on=eval_on)


@pytest.fixture
def make_args(tmp_path):
    def make(**changes):
        return args_of(**{"output_dir": tmp_path / "run", **changes})

    return make


@pytest.fixture
def make_trainer(pipeline_folder, make_args):
    def make(reward=None, held_out=None, eval_on=None, **changes):
        return trainer_of(pipeline_folder, make_args(**changes), reward, held_out, eval_on)

    return make


@pytest.fixture
def config(pipeline_folder, tmp_path):
    """The YAML of a run of seconds, for `tests.rl.command.command`."""
    from tests.rl.command import write_config

    return write_config(pipeline_folder, tmp_path)
