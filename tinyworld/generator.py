"""The generator: a small Stable Diffusion, trained from nothing on tinyworld's captioned pictures.

v-prediction (Salimans & Ho 2022, eq. 10 and appendix D) under Stable Diffusion's own noise schedule; a tenth of the
captions is dropped for guidance.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from tinyworld.loop import fit, half_precision, keyed
from tinyworld.text import WIDTH, tokenize

STEPS = 7000
FINISHING_STEPS = 1500
BATCH = 64
_DROPPED = 0.1


def new_unet(seed: int = 0) -> UNet2DConditionModel:
    """An untrained U-Net of 6 M parameters on 16x16 latents, with cross-attention at the two lower levels."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled from its noisy end ("trailing")."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # has no effect under "trailing"; without it the pipeline warns
    )


class Denoiser(nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(B, 4, 16, 16) noisy latents, (B,) timesteps, (B, 16) token ids -> (B, 4, 16, 16) predicted v."""
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample


def train_generator(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    captions: list[str],
    path: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    report=None,
) -> Denoiser:
    """Train on (N, 4, 16, 16) scaled latents and their captions; see `tinyworld.loop.fit` for `path` and `report`."""
    model = Denoiser(new_unet(seed), text_encoder.train())
    loss = _velocity_loss(model, tokenizer, latents, captions, (3, seed))
    slower = list(model.text_encoder.parameters())
    return fit(model, loss, path, steps=steps, rate=1.5e-3, warmup=300, averaging=0.9985, slower=slower, report=report)


def finish_generator(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    captions: list[str],
    path: Path,
    *,
    steps: int = FINISHING_STEPS,
    rate: float = 5e-4,
    warmup: int = 50,
    averaging: float = 0.995,
    seed: int = 0,
    report=None,
) -> Denoiser:
    """Go on with what `train_generator` returned, at a small rate that falls to zero, on better pictures than before:
    as Stable Diffusion's makers finished theirs on the pictures that a model of aesthetics liked. See
    `tinyworld.loop.fit` for the arguments."""
    model.train().requires_grad_(True)
    loss = _velocity_loss(model, tokenizer, latents, captions, (8, seed))
    slower = list(model.text_encoder.parameters())
    return fit(
        model, loss, path, steps=steps, rate=rate, warmup=warmup, cooldown=1.0, averaging=averaging, slower=slower,
        report=report,
    )  # fmt: skip


def _velocity_loss(
    model: Denoiser, tokenizer: CLIPTokenizer, latents: torch.Tensor, captions: list[str], key: tuple[int, ...]
) -> Callable[[int], torch.Tensor]:
    """step -> the loss of its batch, drawn by (`key`, step) from (N, 4, 16, 16) scaled latents and their captions."""
    scheduler = new_scheduler()
    ids = tokenize(tokenizer, captions)
    empty = tokenize(tokenizer, [""])

    def loss(step: int) -> torch.Tensor:
        source = keyed(*key, step)
        rows = torch.randint(len(latents), (BATCH,), generator=source)
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=source)
        # Stratified timesteps: one from each of the batch's equal slices, so that the loss is steadier.
        slices = torch.arange(BATCH) + torch.rand(BATCH, generator=source)
        timesteps = (slices * (scheduler.config.num_train_timesteps / BATCH)).long()
        dropped = torch.rand(BATCH, generator=source) < _DROPPED
        wanted = torch.where(dropped[:, None], empty, ids[rows])
        with half_precision():
            predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps, wanted)
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timesteps))

    return loss


def pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """All parts as the pipeline that users load."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def sample(
    parts: StableDiffusionPipeline,
    captions: list[str],
    *,
    seed: int,
    steps: int = 10,
    guidance: float = 1.0,
    eta: float = 1.0,
    batch: int = 64,
) -> np.ndarray:
    """Draw one picture a caption with the pipeline itself: (N, 64, 64, 3) uint8, the noise keyed by (seed, row)."""
    parts.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), batch):
        rows = range(start, min(start + batch, len(captions)))
        result = parts(
            [captions[row] for row in rows],
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=[keyed(4, seed, row) for row in rows],
            output_type="np",
        )
        pictures.append(np.round(result.images * 255).astype(np.uint8))
    return np.concatenate(pictures)
