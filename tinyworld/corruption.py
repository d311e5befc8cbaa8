"""Pictures spoiled at random places, and where: what a predictor can learn of well-formed outlines without any rater.

Shapes: B pictures of 64x64. Everything is drawn from the generator given.
"""

import torch
from torch.nn import functional as F

_REACH = 4.0  # pixels, the largest standard deviation of a displacement
_SEEN = 0.25  # a smaller change of colour, of channels in [0, 1], is not marked


def corrupt(images: torch.Tensor, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Spoil each picture somewhere: outlines bent, the next picture shining through, or a blurred place.

    Args:
        images: (B, 3, 64, 64) float in [0, 1].

    Returns:
        The spoiled pictures, and (B, 64, 64) bool where they are visibly changed, and one pixel around.
    """
    count, size = len(images), images.shape[-1]
    place = torch.sigmoid(8 * (_smooth((count, 1), 5, size, source) - 0.2))  # (B, 1, S, S), most of it 0 or 1

    amount = _REACH * torch.rand(count, 1, 1, 1, generator=source)
    moved = place * amount * _smooth((count, 2), 10, size, source)  # (B, 2, S, S), pixels
    axis = torch.arange(size) + 0.5
    where = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))  # x, y
    grid = ((where + moved) / size * 2 - 1).movedim(1, -1)
    bent = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    share = place * (0.4 + 0.6 * torch.rand(count, 1, 1, 1, generator=source))
    mixed = images + share * (images.roll(1, 0) - images)
    blurred = F.avg_pool2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), 7, stride=1)
    blurred = images + place * (blurred - images)

    kind = torch.rand(count, 1, 1, 1, generator=source)
    spoiled = torch.where(kind < 0.6, bent, torch.where(kind < 0.8, mixed, blurred))
    changed = ((spoiled - images).abs().amax(1, keepdim=True) > _SEEN).float()
    return spoiled, F.max_pool2d(changed, 3, stride=1, padding=1)[:, 0] > 0


def _smooth(shape: tuple[int, int], nodes: int, size: int, source: torch.Generator) -> torch.Tensor:
    """(*shape, size, size): normal noise at nodes x nodes points, and smooth in between."""
    return F.interpolate(torch.randn(*shape, nodes, nodes, generator=source), size, mode="bicubic", align_corners=True)
