"""Vision encoders of transformers as RAHF sees them: a grid of feature vectors, from patches or from convolutions.

Plain ones (ViT, DeiT, BEiT, CLIP, SigLIP, SigLIP 2, DINOv2 and their like) keep one token a patch; staged ones (ResNet,
ConvNeXt, Swin, with `depths` in their config) halve the grid from stage to stage.

Shapes: B images of H x W pixels, g x k the grid, P = g * k, D the encoder's width.
"""

import inspect
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

_UNREAD = {
    "clip_vision_model": ("post_layernorm.",),
    "siglip_vision_model": ("head.",),
    "siglip2_vision_model": ("head.",),
    "convnext": ("layernorm.",),
    "convnextv2": ("layernorm.",),
    "dinov2": ("embeddings.mask_token",),
    "dinov2_with_registers": ("embeddings.mask_token",),
    "dinov3_vit": ("embeddings.mask_token",),
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
            "like ViT, CLIP, SigLIP, SigLIP 2, DINOv2, ResNet, ConvNeXt or Swin"
        )
    return patch


def size_of(config: PreTrainedConfig) -> int | list[int]:
    """The size of the pictures that an encoder was made for, as its config says it: a side, or [height, width].

    Raises:
        ValueError: the config does not say, as a ResNet's.
    """
    if _takes_patches(config):
        return math.isqrt(config.num_patches) * stride_of(config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"give image_size: the vision encoder, a {config.model_type!r}, has none of its own")
    return size if isinstance(size, int) else list(size)


def normalisation_of(folder: str | Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of R, G, B, of pixels in [0, 1], by which a pretrained encoder's pixels were
    normalised, as the image processor in its folder (or at its name in the hub) says; None if there is none that does.
    """
    try:
        told, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except OSError:
        return None
    if not told.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    mean, std = told.get("image_mean"), told.get("image_std")
    if not all(isinstance(values, (list, tuple)) and len(values) == 3 for values in (mean, std)):
        return None
    return [float(value) for value in mean], [float(value) for value in std]


def check_size(config: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Raise a `ValueError` if the encoder cannot see pictures of `size` = (H, W)."""
    stride = stride_of(config)
    if min(size) < stride or any(side % stride for side in size):
        given = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
        raise ValueError(
            f"image_size {given} is no multiple of {stride}, the pixels that one feature of the vision encoder stands "
            "for"
        )
    if not _is_own(config, size) and not (is_staged(config) or _interpolates(config) or _any_size(config)):
        raise ValueError(
            f"the vision encoder, a {config.model_type!r}, sees pictures of {size_of(config)} pixels only; leave "
            "image_size away"
        )
    own = getattr(config, "image_size", None)
    if not _is_own(config, size) and _interpolates(config) and not isinstance(own, int) and len(set(own)) > 1:
        raise ValueError(
            f"the vision encoder, a {config.model_type!r}, was made for pictures of {list(own)} pixels; only from a "
            "square are its positions interpolated: leave image_size away"
        )


def resizing(config: PreTrainedConfig, size: tuple[int, int]) -> dict[str, bool]:
    """What an encoder must be called with to see pictures of `size` = (H, W), not its own: interpolate positions."""
    return {"interpolate_pos_encoding": True} if not _is_own(config, size) and _interpolates(config) else {}


def _is_own(config: PreTrainedConfig, size: tuple[int, int]) -> bool:
    own = getattr(config, "image_size", None)
    return tuple(size) == ((own, own) if isinstance(own, int) else tuple(own or ()))


def _interpolates(config: PreTrainedConfig) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(_class_of(config).forward).parameters


def _class_of(config: PreTrainedConfig) -> type:
    """The class that `AutoModel` builds for `config`."""
    kind = AutoModel._model_mapping[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def _any_size(config: PreTrainedConfig) -> bool:
    """Whether the encoder takes its positions from the picture it is given."""
    return config.model_type.startswith(("dinov2", "dinov3")) or _takes_patches(config)


def _takes_patches(config: PreTrainedConfig) -> bool:
    """Whether the encoder takes patches of pictures of any shape: SigLIP 2 of the NaFlex kind."""
    return config.model_type == "siglip2_vision_model"


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


def see(encoder: nn.Module, pixel_values: torch.Tensor, **how: bool) -> torch.Tensor:
    """An encoder's last hidden state of images (B, 3, H, W), as `tokens_of` takes it.

    Args:
        how: what `resizing` says.
    """
    if _takes_patches(encoder.config):
        return _see_patches(encoder, pixel_values)
    return encoder(pixel_values=pixel_values, **how).last_hidden_state


def _see_patches(encoder: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a NaFlex model says of images (B, 3, H, W) that have all one size, (B, P, D).

    Its own `forward` would read each image's size from the device, and interpolate the same positions for each.
    """
    parts, side = encoder.embeddings, stride_of(encoder.config)
    blocks = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, g, side, k, side)
    patches = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    own = parts.position_embedding_size
    places = parts.position_embedding(torch.arange(own**2, device=pixel_values.device))
    places = places.T.unflatten(1, (own, own))[None].float()
    places = F.interpolate(places, (blocks.shape[2], blocks.shape[4]), mode="bilinear", antialias=True)
    embedded = parts.patch_embedding(patches.to(parts.patch_embedding.weight.dtype))
    # In the weights' precision, which autocast leaves alone: so is what the layers add to.
    embedded = embedded + places.flatten(2).transpose(1, 2).to(parts.position_embedding.weight.dtype)
    return encoder.post_layernorm(encoder.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state)


def tokens_of(features: torch.Tensor, count: int) -> torch.Tensor:
    """An encoder's last hidden state -> (B, P, D) in raster order.

    Args:
        features: (B, n + P, D) with class and register tokens first, if any; or a map (B, D, g, k).
        count: P.
    """
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, -count:]
