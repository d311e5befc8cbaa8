"""Vision encoders of transformers as RAHF sees them: a grid of feature vectors, from patches or from convolutions.

Shapes: B images of S x S pixels, g x g the grid, P = g * g, D the encoder's width.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig


def width_of(config: PreTrainedConfig) -> int:
    """D: the width of a vision encoder's feature vectors."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def stride_of(config: PreTrainedConfig) -> int:
    """How many pixels one step on the grid is: the patch's side, or what the convolutions shrink by.

    Raises:
        ValueError: the encoder is neither of the ViT family nor a ResNet.
    """
    if (patch := getattr(config, "patch_size", None)) is not None:
        return patch if isinstance(patch, int) else patch[0]
    if config.model_type == "resnet":
        return 4 * 2 ** (len(config.depths) - 1 + config.downsample_in_first_stage)
    raise ValueError(
        f"the vision encoder is a {config.model_type!r}; use one of the ViT family (with `patch_size`) or a ResNet"
    )


def has_places(config: PreTrainedConfig) -> bool:
    """Whether the encoder tells in its features where in the image they are from, by position embeddings."""
    return hasattr(config, "patch_size")


def without_pooler(encoder: nn.Module) -> nn.Module:
    """The encoder less its pooler's weights: nothing reads that output, and unused weights trouble DDP and ZeRO."""
    if hasattr(encoder, "pooler") and any(True for _ in encoder.pooler.parameters()):
        encoder.pooler = None
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
