"""Does a preset fit its GPU? The memory of one process, computed without the GPU and without the weights.

    python benchmarks/preset_memory.py [--configs configs/ddpo_sd15.yaml ...] [--quick] [--json FILE]

The preset's own code - sampling with guidance, decoding, the reward's predictor, a micro-batch forward and backward
with its checkpointing; of `finetune.draft` a micro-batch through sampling, decoder and predictor and back - runs on
tensors that have sizes and no content (PyTorch's fake tensors), on networks of the published sizes of Stable Diffusion
1.5 and XL, of RAHF as `configs/rahf_vit_l.yaml` trains it, and of PickScore's CLIP ViT-H/14. Every storage is counted
from when it is made to when it is let go. Normalisations run in float32 as they do under a GPU's autocast. What a GPU
needs besides is not in it: CUDA's context, the workspaces of convolutions, and what the allocator loses between blocks;
`GOALS` leaves 4 GiB for these.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from counted_memory import GIB, Counted, fill, norms_in_float32
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from rahf_speed import make_config
from report import Row, flags, publish
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from finetune import draft
from finetune.backprop import Sampler, choose_reach
from finetune.draft_config import DraftConfig
from reward.arguments import parse_arguments
from reward.model import RahfModel
from rl.adapter import AdapterSettings
from rl.ddpo_config import DDPOConfig
from rl.losses import ppo_loss
from rl.memory import MemorySettings
from rl.policy import PictureSize, StableDiffusionPolicy
from rl.rollout import sample
from rl.sde import Schedule, ddim_scheduler, log_prob_map, make_schedule, step_mean
from run_ddpo import RunArguments

ROOT = Path(__file__).parents[1]
GOALS = {
    "ddpo_sd15": 24 - 4,
    "ddpo_sdxl": 80 - 4,
    "ddpo_sdxl_8gpu": 80 - 4,
    "draft_sd15": 24 - 4,
    "draft_sdxl": 80 - 4,
}
"""GiB of the GPU that the preset is for, less what is not counted."""
STEPS, TRAINED = 3, 1  # memory does not ask how many steps there are
WORDS = 16


def sd15(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in its published size, without weights."""
    unet = UNet(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config()), tokenizer=tokenizer, unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's base in its published size, without weights."""
    unet = UNet(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config()), tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=1280, hidden_act="gelu", **second)),
        scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip


def tokenizer() -> CLIPTokenizer:
    """The small world's: how many tokens there are asks for no memory, a prompt always has as many as fit."""
    return CLIPTokenizer.from_pretrained(ROOT / "tinyworld/assets/sd/tokenizer", model_max_length=77)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip


def text_config(**changes) -> CLIPTextConfig:
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **(size | changes))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def rahf() -> RahfModel:
    """The predictor of `configs/rahf_vit_l.yaml`."""
    return RahfModel(make_config("ViT-L/16-384 + T5-base", "paper"))


def pickscore() -> CLIPModel:
    """CLIP ViT-H/14."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPModel(CLIPConfig(vision_config={**vision, "patch_size": 14}, text_config=text, projection_dim=1024))


@dataclass(frozen=True)
class Memory:
    """GiB of one process.

    Attributes:
        resident: what lies on the GPU all the time.
        visiting: by phase, weights that are on the GPU only then (`offload`).
        phases: by phase, what comes on top at its peak.
    """

    resident: dict[str, float]
    visiting: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(
            size + self.visiting.get(phase, 0.0) for phase, size in self.phases.items()
        )


def memory_of(config: Path) -> Memory:
    """Of a preset's process, where every part has its published size."""
    kinds = [draft.RunArguments, DraftConfig] if config.stem.startswith("draft") else [RunArguments, DDPOConfig]
    _, args = parse_arguments(kinds, ["--config", str(config), "--use_cpu", "true", "--deepspeed", ""])
    dtype = getattr(torch, args.model_dtype)
    with torch.device("meta"):
        pipeline = (sdxl if "sdxl" in config.stem else sd15)(tokenizer())
        predictor, watcher = rahf().requires_grad_(False).eval(), pickscore().requires_grad_(False).eval()
    policy = StableDiffusionPolicy(
        pipeline, args.part(AdapterSettings), 0, PictureSize(args.resolution), args.part(MemorySettings)
    )
    schedule = make_schedule(ddim_scheduler(policy.scheduler), STEPS, args.eta)
    with FakeTensorMode(allow_non_fake_inputs=True), norms_in_float32():
        others = {
            "text encoders": policy._text_encoders,
            "vae": [pipeline.vae],
            "predictor": [predictor],
            "held out": [watcher],
        }
        sizes = {"network": fill(policy.network, dtype)}
        kinds = {"predictor": torch.float32, "held out": torch.float16}
        for name, parts in others.items():
            sizes[name] = sum(fill(part, kinds.get(name, dtype)) for part in parts)
        trained = sum(weight.numel() for weight in policy.network.parameters() if weight.requires_grad)
        sizes["gradients, optimizer"] = trained * 4 * 3 / GIB  # whole: what ZeRO shards of a LoRA is little
        phases_by = phases_of_draft if isinstance(args, DraftConfig) else phases_of
        phases = phases_by(policy, schedule, args, predictor, watcher)
    if not args.offload:
        return Memory(sizes, {}, phases)
    places = {"vae": "decode", "predictor": "reward", "held out": "held out", "text encoders": "rollout"}
    if isinstance(args, DraftConfig):  # gradients pass the others
        places = {"text encoders": "encode"}
    visiting = {phase: sizes.pop(name) for name, phase in places.items()}
    return Memory(sizes, visiting, phases)


def phases_of(
    policy: StableDiffusionPolicy, schedule: Schedule, args: DDPOConfig, predictor: RahfModel, watcher: CLIPModel
) -> dict[str, float]:
    """GiB that each phase of a rollout and its update needs on top of the weights, by running one batch of it."""
    counted, phases = Counted(), {}
    for module in (policy.network, policy.pipeline.vae, *policy._text_encoders, predictor, watcher):
        counted.ignore(module)
    rows = args.per_device_rollout_batch_size or args.per_device_train_batch_size
    noise = torch.empty(rows, STEPS + 1, *policy.latent_shape)
    prompts = [f"picture {number}" for number in range(rows)]
    if args.activation_checkpointing:
        policy.pipeline.unet.enable_gradient_checkpointing()
    policy.network.train()
    with counted, torch.autocast("cpu", getattr(torch, args.model_dtype), enabled=args.bf16 or args.fp16):
        with counted.of(phases, "rollout"):
            how = {"guidance_scale": args.guidance_scale, "train_guidance": args.train_guidance}
            drawn = sample(policy, policy.network, prompts, noise, schedule, [TRAINED], **how)
        with counted.of(phases, "decode"):
            images = policy.decode(drawn.final_latents)
        with counted.of(phases, "reward"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            side = predictor.config.input_size
            words = torch.ones(rows, WORDS, dtype=torch.long)
            pixels = nn.functional.interpolate(images, side, mode="bicubic", antialias=True)
            predictor(pixels, input_ids=words, attention_mask=words)
        with counted.of(phases, "held out"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            _look(watcher, images)
        del images, pixels
        with counted.of(phases, "update"):
            batch = slice(0, args.per_device_train_batch_size)
            steps = torch.full((len(prompts[batch]),), TRAINED)
            latents = drawn.latents[0, batch]
            guidance = args.guidance_scale if args.train_guidance else 1.0
            conditioning = policy.encode(prompts[batch])
            output = policy.predict(policy.network, latents, schedule.timesteps[steps], conditioning, guidance)
            log_probs = log_prob_map(drawn.next_latents[0, batch], *step_mean(output, latents, steps, schedule))
            weights = torch.ones_like(log_probs)
            loss, _ = ppo_loss(
                log_probs, drawn.log_probs[0, batch], weights[:, 0, 0], weights, args.epsilon, "image", channels=4
            )
            trained = [weight for weight in policy.network.parameters() if weight.requires_grad]
            torch.autograd.grad(loss, trained)
    return phases


def phases_of_draft(
    policy: StableDiffusionPolicy, schedule: Schedule, args: DraftConfig, predictor: RahfModel, watcher: CLIPModel
) -> dict[str, float]:
    """GiB that a micro-batch of back-propagation needs on top of the weights: one phase, as one graph goes through."""
    counted, phases = Counted(), {}
    for module in (policy.network, policy.pipeline.vae, *policy._text_encoders, predictor, watcher):
        counted.ignore(module)
    rows, reach = args.per_device_train_batch_size, choose_reach(args, STEPS, 0)
    noise = torch.empty(rows, STEPS + 1, *policy.latent_shape)
    fresh = torch.empty(rows, reach.draws - 1, *policy.latent_shape)
    prompts = [f"picture {number}" for number in range(rows)]
    if args.activation_checkpointing:
        policy.pipeline.unet.enable_gradient_checkpointing()
        policy.pipeline.vae.enable_gradient_checkpointing()
    policy.network.train()
    size = args.reward_batch_size or rows * reach.draws
    side, words = predictor.config.input_size, torch.ones(size, WORDS, dtype=torch.long)

    def judged(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            pixels = nn.functional.interpolate(images, side, mode="bicubic", antialias=True)
            asked = words[: len(images)]
            said = predictor(pixels, input_ids=asked, attention_mask=asked)
        return said.scores.mean(dim=1) - said.heatmaps.mean(dim=(1, 2, 3))

    with counted, torch.autocast("cpu", getattr(torch, args.model_dtype), enabled=args.bf16 or args.fp16):
        with counted.of(phases, "encode"):
            policy.encode(prompts * reach.draws)
        with counted.of(phases, "update"):
            sampler = Sampler(policy, policy.network, schedule, args.guidance_scale, args.recompute_steps)
            # Not asked how far the base is: its pass leaves nothing, and is over before the decoder begins.
            images = policy._decoded(sampler.draw(prompts, noise, reach, fresh).latents)
            asked = [checkpoint(judged, part, use_reentrant=False) if size < len(images) else judged(part)
                     for part in images.split(size)]  # fmt: skip
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the trainer asks while the graph is there
                for part in images[:rows].split(size):
                    _look(watcher, part)
            trained = [weight for weight in policy.network.parameters() if weight.requires_grad]
            torch.autograd.grad(-torch.cat(asked).mean(), trained)
    return phases


def _look(watcher: CLIPModel, images: torch.Tensor) -> None:
    """What PickScore does with pictures."""
    watcher.get_image_features(nn.functional.interpolate(images, 224, mode="bicubic", antialias=True).half())


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    presets = [ROOT / "configs" / f"{name}.yaml" for name in GOALS]
    parser.add_argument("--configs", type=Path, nargs="+", default=presets, metavar="YAML")
    options = parser.parse_args(argv)
    began, rows = time.perf_counter(), []
    for config in options.configs[: 1 if options.quick else None]:
        memory = memory_of(config)
        rows += [Row(f"{config.stem}, GiB of weights, {name}", size) for name, size in memory.resident.items()]
        rows += [Row(f"{config.stem}, GiB on top, {name}", size) for name, size in memory.phases.items()]
        rows += [
            Row(f"{config.stem}, GiB of weights while they work, {name}", size)
            for name, size in memory.visiting.items()
        ]
        goal = GOALS.get(config.stem)
        rows.append(Row(f"{config.stem}, GiB at the peak", memory.peak, goal=goal and f"<= {goal}"))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
