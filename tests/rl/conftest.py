"""A tiny Stable Diffusion pipeline with random weights: everything a real one has, in 16 x 16 pixels."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "of", "two"]
PROMPTS = ["a red circle", "a blue square", "two green star", "a red star left of a blue circle", "a green square"]


def make_pipeline(folder, scheduler=None):
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}</w>" not in vocabulary]
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, projection_dim=16,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


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


@pytest.fixture
def make_args(tmp_path):
    """DDPOConfig of a run of seconds; keywords override."""
    from rl.ddpo import DDPOConfig

    def make(**changes):
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "num_train_epochs": 2, "num_inference_steps": 3,
            "generation_batch_size": 8, "num_generations": 4, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4, "lora_rank": 2, "lora_alpha": 4.0, "disable_tqdm": True,
            "report_to": [], "seed": 3, "num_log_images": 0, "train_steps": ["0:2"],
        }  # fmt: skip
        return DDPOConfig(**{**settings, **changes})

    return make


@pytest.fixture
def make_trainer(pipeline_folder, make_args):
    from rl.ddpo import DDPOTrainer
    from rl.policy import StableDiffusionPolicy
    from tests.rl.toy_rewards import Redness

    def make(reward=None, held_out=None, **changes):
        args = make_args(**changes)
        policy = StableDiffusionPolicy.load(
            pipeline_folder,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_target_modules=args.lora_target_modules,
            seed=args.seed,
        )
        return DDPOTrainer(policy, reward or Redness(), args, PROMPTS, held_out=held_out)

    return make
