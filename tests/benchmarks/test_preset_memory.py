"""What a preset needs is counted storage by storage, and is the same of tensors without content as of real ones."""

from pathlib import Path

import preset_memory
import pytest
import torch
from counted_memory import GIB, Counted, norms_in_float32
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from preset_memory import memory_of, phases_of, phases_of_draft
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, T5Config, ViTConfig

from finetune import draft
from finetune.draft_config import DraftConfig
from reward.arguments import parse_arguments
from reward.model import RahfModel
from reward.rahf_config import RahfConfig
from rl.adapter import AdapterSettings
from rl.ddpo_config import DDPOConfig
from rl.memory import MemorySettings
from rl.policy import PictureSize, StableDiffusionPolicy
from rl.sde import ddim_scheduler, make_schedule
from run_ddpo import RunArguments

PRESET, DRAFT = Path("configs/ddpo_sd15.yaml"), Path("configs/draft_sd15.yaml")


def test_storages_are_counted_from_when_they_are_made_to_when_they_are_let_go():
    phases = {}
    with Counted() as counted, counted.of(phases, "sum"):
        one = torch.ones(1000)
        view = one[:10]
        two = one + one
        del one
        assert counted.now == 8000, "a view keeps the whole"
        del view, two
        assert counted.now == 0
        torch.ones(500)
    assert phases == {"sum": 8000 / GIB}


def small_sd(tokenizer) -> StableDiffusionPipeline:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    unet = UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(preset_memory.text_config(**sizes)), tokenizer=tokenizer, unet=unet,
        scheduler=preset_memory.scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def small_rahf(side: int = 32) -> RahfModel:
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=side
    )
    return RahfModel(RahfConfig(vision_config=vision, text_config=T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1)))


def small_clip() -> CLIPModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(vision_config={**sizes, "patch_size": 32}, text_config=sizes, projection_dim=16))


@pytest.fixture(scope="module")
def small():
    """Networks of all kinds, small."""
    with pytest.MonkeyPatch.context() as patched:
        for name, made in (("sd15", small_sd), ("rahf", small_rahf), ("pickscore", small_clip)):
            patched.setattr(preset_memory, name, made)
        yield


@pytest.fixture(scope="module")
def memory(small):
    """What the preset needs with small networks."""
    return memory_of(PRESET)


def test_tensors_without_content_need_what_real_ones_do(memory):
    _, args = parse_arguments([RunArguments, DDPOConfig], ["--config", str(PRESET), "--use_cpu", "true"])
    pipeline = small_sd(preset_memory.tokenizer()).to(torch.bfloat16)
    policy = StableDiffusionPolicy(pipeline, args.part(AdapterSettings), 0, PictureSize(), args.part(MemorySettings))
    schedule = make_schedule(ddim_scheduler(policy.scheduler), preset_memory.STEPS, args.eta)
    with norms_in_float32():
        real = phases_of(policy, schedule, args, small_rahf().eval(), small_clip().half().eval())
    assert memory.phases == pytest.approx(real, rel=0.02)
    frozen = sum(weight.numel() for weight in policy.network.parameters() if not weight.requires_grad)
    trained = sum(weight.numel() for weight in policy.network.parameters() if weight.requires_grad)
    assert memory.resident["network"] * GIB == 2 * frozen + 4 * trained, "bfloat16, and what is trained in float32"
    assert memory.resident["gradients, optimizer"] * GIB == 12 * trained
    assert memory.peak == sum(memory.resident.values()) + max(memory.phases.values())


def test_parts_that_are_offloaded_lie_there_only_while_they_work(memory, tmp_path):
    moved = tmp_path / PRESET.name
    moved.write_text(PRESET.read_text() + "\noffload: true\n")
    away = memory_of(moved)
    assert set(memory.resident) - set(away.resident) == {"text encoders", "vae", "predictor", "held out"}
    assert away.visiting["decode"] == memory.resident["vae"]
    assert away.peak < memory.peak


def test_back_propagation_needs_without_content_what_it_needs_of_real_tensors(small):
    counted = memory_of(DRAFT)
    kinds = [draft.RunArguments, DraftConfig]
    _, args = parse_arguments(kinds, ["--config", str(DRAFT), "--use_cpu", "true"])
    pipeline = small_sd(preset_memory.tokenizer()).to(torch.bfloat16)
    policy = StableDiffusionPolicy(pipeline, args.part(AdapterSettings), 0, PictureSize(), args.part(MemorySettings))
    schedule = make_schedule(ddim_scheduler(policy.scheduler), preset_memory.STEPS, args.eta)
    with norms_in_float32():
        judges = small_rahf().requires_grad_(False).eval(), small_clip().half().requires_grad_(False).eval()
        real = phases_of_draft(policy, schedule, args, *judges)
    assert counted.phases == pytest.approx(real, rel=0.02)
    assert counted.resident["held out"] > 0


def test_asking_the_reward_in_batches_needs_the_memory_of_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(preset_memory, "rahf", lambda: small_rahf(side=256))  # the largest part, as in earnest
    whole = tmp_path / DRAFT.name
    whole.write_text(DRAFT.read_text().replace("reward_batch_size: 1 ", "reward_batch_size: 8 "))
    assert memory_of(whole).phases["update"] > 1.2 * memory_of(DRAFT).phases["update"]
