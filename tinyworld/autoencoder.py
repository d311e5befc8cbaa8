"""The picture autoencoder: 64x64 pictures to 16x16 latents of 4 channels (f = 4) and back."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tinyworld.loop import fit, half_precision, keyed

STEPS = 2500
_BATCH = 24
_NOISE = 0.1  # on the latents, in their standard deviations
_INSIDE = 0.25  # of a batch: shapes on shapes are rare, and the hardest to keep
_DETAIL = 4.0  # what a pixel of a block of several colours counts more
_ANCHOR = 0.1  # weight of the tie between a block of one colour and its RGB


def new_autoencoder(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder of 0.8 M parameters."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_unit(pictures: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: torch.Tensor) -> np.ndarray:
    """(B, 3, 64, 64) float in [-1, 1] -> (B, 64, 64, 3) uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train_autoencoder(pictures: np.ndarray, captions: list[str], work: Path, steps: int = STEPS) -> AutoencoderKL:
    """Train on (N, 64, 64, 3) uint8 pictures and their captions; the latents are whitened, and `scaling_factor` is 1.

    Left alone, the encoder packs the colours into a plane, where halfway between two often lies a third: whatever
    draws latents and is not sure yet then draws that third colour. So a block of one colour is tied to its RGB, in
    which the palette lies well apart; blocks of several colours are free.
    """
    vae = new_autoencoder()
    inside = torch.tensor([row for row, caption in enumerate(captions) if " inside " in caption])
    special = round(_INSIDE * _BATCH)

    def loss(step: int) -> torch.Tensor:
        source = keyed(1, step)
        rows = torch.randint(len(pictures), (_BATCH,), generator=source)
        rows[:special] = inside[torch.randint(len(inside), (special,), generator=source)]
        images = to_unit(pictures[rows.numpy()])
        blocks = images.unflatten(3, (16, 4)).unflatten(2, (16, 4))  # (B, 3, 16, 4, 16, 4)
        plain = blocks.std((3, 5)).amax(1) < 0.02  # (B, 16, 16)
        weight = torch.where(plain, 1.0, 1.0 + _DETAIL)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
        noise = torch.randn(_BATCH, 4, 16, 16, generator=source)
        with half_precision():
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + _NOISE * posterior.mean.detach().std() * noise
            decoded = vae.decode(latents).sample.float()
        # The posterior's own noise would be learned with its divergence, at the price of the distances between colours.
        # Noise of a fixed size makes the decoder robust and leaves them.
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        off = (decoded - images).abs()
        anchored = ((posterior.mean[:, :3] - 1.5 * blocks.mean((3, 5))) ** 2).mean(1)[plain].mean()
        return (weight * (off + 0.5 * off**2)).mean() + _ANCHOR * anchored + 1e-6 * divergence

    vae = fit(vae, loss, work / "autoencoder.pt", steps=steps, rate=2e-3, averaging=0.99)
    whiten(vae, pictures[:2000])
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Give each latent channel zero mean and unit variance over `pictures`, by the convolutions next to the latents.

    A pipeline knows one scaling factor for all channels. Under it a channel of small variance, such as one that tells
    two colours apart, drowns in noise until the last sampling step, which then blends what it cannot tell apart.
    """
    latents = encode(vae, pictures)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out_of = vae.quant_conv, vae.post_quant_conv  # 1x1 convolutions to (mean, log variance), and from latents
    channels = len(mean)
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 25) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 4, 16, 16) float32 means of the latents, not scaled."""
    return torch.cat(
        [vae.encode(to_unit(pictures[i : i + batch])).latent_dist.mean for i in range(0, len(pictures), batch)]
    )


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 100) -> np.ndarray:
    """The way back: latents, not scaled, -> (N, 64, 64, 3) uint8."""
    return np.concatenate(
        [to_pictures(vae.decode(latents[i : i + batch]).sample) for i in range(0, len(latents), batch)]
    )
