"""Changes of a picture that nobody sees, and that a reward should not see either; pure, tensors in and out."""

import io

import torch
from PIL import Image

from reward.data import to_tensor
from reward.draw import to_image


def as_jpeg(images: torch.Tensor, quality: int = 95) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], compressed as JPEGs and opened again."""
    return torch.stack([_through_jpeg(image, quality) for image in images]).to(images.device)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) moved right by one pixel; the first column stands there twice, the last one is gone."""
    return torch.cat([images[..., :1], images[..., :-1]], dim=-1)


def _through_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    to_image(image).save(buffer, format="JPEG", quality=quality)
    return to_tensor(Image.open(buffer)).float() / 255


ASKED_AGAIN = "asked again"
"""No change at all: of a reward that samples, or whose answer depends on what else is in the batch."""
CHANGES = {"jpeg 95": as_jpeg, "1 pixel": shifted}
