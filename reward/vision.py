"""Vision encoders of transformers as RAHF sees them: a grid of feature vectors, from patches or from convolutions.

Plain ones (ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2 and their like) keep one token a patch; staged ones (ResNet, ConvNeXt,
Swin, with `depths` in their config) halve the grid from stage to stage.

Shapes: B images of S x S pixels, g x g the grid, P = g * g, D the encoder's width.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

_UNREAD = {
    "clip_vision_model": ("post_layernorm.",),
    "siglip_vision_model": ("head.",),
    "convnext": ("layernorm.",),
    "convnextv2": ("layernorm.",),
    "dinov2": ("embeddings.mask_token",),
}
"""By type of encoder, the weights that do not lead to its last hidden state."""

_STEM = 4  # pixels a side, where a staged encoder's config does not say: that of a ResNet


def width_of(config: PreTrainedConfig) -> int:
    """D: the width of a vision encoder's feature vectors."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def stride_of(config: PreTrainedConfig) -> int:
    """How many pixels one step on the grid is.

    Raises:
        ValueError: the encoder is neither a plain nor a staged one.
    """
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if is_staged(config):
        halvings = len(config.depths) - 1 + getattr(config, "downsample_in_first_stage", False)
        return (patch or _STEM) * 2**halvings
    if patch is None:
        raise ValueError(
            f"the vision encoder is a {config.model_type!r}, which says neither `patch_size` nor `depths`; use one "
            "like ViT, CLIP, SigLIP, DINOv2, ResNet, ConvNeXt or Swin"
        )
    return patch


def is_staged(config: PreTrainedConfig) -> bool:
    """Whether the encoder halves its grid from stage to stage; such ones know no absolute places in the image."""
    return hasattr(config, "depths")


def only_features(encoder: nn.Module) -> nn.Module:
    """The encoder, in place, less the weights behind its features: unused, they would trouble DDP and ZeRO.

    A pooler's weights are dropped, others are frozen.
    """
    if getattr(encoder, "pooler", None) is not None and any(True for _ in encoder.pooler.parameters()):
        encoder.pooler = None
    unread = _UNREAD.get(encoder.config.model_type, ())
    for name, parameter in encoder.named_parameters():
        if name.startswith(unread):
            parameter.requires_grad_(False)
    return encoder


def tokens_of(features: torch.Tensor, count: int) -> torch.Tensor:
    """An encoder's last hidden state -> (B, P, D) in raster order.

    Args:
        features: (B, n + P, D) with class and register tokens first, if any; or a map (B, D, g, g).
        count: P.
    """
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, -count:]
