"""The loss of supervised fine-tuning of a diffusion model. Pure.

x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps ("Denoising diffusion probabilistic models", Ho et al. 2020, arXiv
2006.11239, eq. 4); the network predicts eps, v, or x_0. Shapes: B pictures, C latent channels, h x w the latent grid.
"""

import torch


def noised(clean: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """x_t (B, C, h, w) of clean latents and noise, both (B, C, h, w), at cumulative alphas (B,)."""
    alphas = alphas.view(-1, 1, 1, 1)
    return alphas.sqrt() * clean + (1 - alphas).sqrt() * noise


def target(clean: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """What the network is to say of x_t, (B, C, h, w)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":  # "Progressive distillation", Salimans & Ho 2022, appendix D
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    assert prediction_type == "sample", prediction_type
    return clean


def offset_noise(noise: torch.Tensor, shift: torch.Tensor, amount: float) -> torch.Tensor:
    """Noise (B, C, h, w) with a random shift (B, C) of each channel's mean, so that a network can learn to draw
    pictures much darker or lighter than the average ("Diffusion with offset noise", Guttenberg 2023)."""
    return noise + amount * shift[:, :, None, None]


def min_snr_weights(alphas: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights (B,) of the errors at cumulative alphas (B,), by min-SNR-gamma ("Efficient diffusion training via min-SNR
    weighting strategy", Hang et al. 2023, arXiv 2303.09556, section 3.4): in units of x_0 each weighs min(SNR, gamma),
    so in units of eps that by SNR (1 where there is no signal), of v that by SNR + 1."""
    snr = alphas / (1 - alphas)
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped


def sft_loss(output: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean squared error of B pictures.

    Args:
        output, wanted: (B, C, h, w).
        weights: (B,) >= 0.

    Returns:
        The sum over pictures of weight times the mean over (C, h, w), divided by B, not by the weights' sum; and the
        same with all weights 1, detached.
    """
    errors = ((output.float() - wanted.float()) ** 2).mean(dim=(1, 2, 3))
    return (weights * errors).mean(), errors.detach().mean()
