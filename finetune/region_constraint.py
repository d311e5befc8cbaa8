"""Only what was wrong may change: the region constraint of Focus-N-Fix.

"Focus-N-Fix: Region-aware fine-tuning for text-to-image generation" (Xing et al. 2025, arXiv 2501.06481) adds to the
reward's loss

    b * mean |(1 - M) * (image - image_before)|

where `image_before` is what the base model draws from the same noise, and M, in {0, 1}, the region in which that
picture has a problem. Here M comes from the reward's own penalty maps. Shapes: B pictures of H x W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from reward.draw import caption, grid, overlay, to_image

_HEIGHT = 128


def place_cost(penalties: Mapping[str, torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """What all maps together cost in each place of a picture, (B, 1, H, W) >= 0, in units of the reward.

    Args:
        penalties: name -> (B, h, w) >= 0, what each place costs. At least one map.
        size: (H, W).
    """
    cost = torch.zeros(())
    for maps in penalties.values():
        maps = maps.detach().float()[:, None]
        if maps.shape[-2:] != tuple(size):
            maps = F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
        cost = cost.to(maps.device) + maps
    return cost


def problem_region(cost: torch.Tensor, threshold: float, dilation: float) -> torch.Tensor:
    """M: where a picture has a problem, (B, 1, H, W) of 0 and 1.

    Args:
        cost: (B, 1, H, W), see `place_cost`.
        threshold: a place is a problem if it costs more than this.
        dilation: by so much the region grows in every direction, as a share of the picture's shorter side.
    """
    region = (cost > threshold).float()
    reach = round(dilation * min(cost.shape[-2:]))
    return F.max_pool2d(region, 2 * reach + 1, stride=1, padding=reach)


def region_loss(images: torch.Tensor, before: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """mean |(1 - M) * (image - image_before)| of images (B, 3, H, W) and M (B, 1, H, W); the mean is over all places,
    those within M too. Without a problem region it covers the whole picture."""
    return ((1 - region) * (images - before)).abs().mean()


def only_within(images: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """`images` (B, 3, H, W) as they are, but that gradients reach them through M (B, 1, H, W) alone: what a reward of
    them is raised by lies within. Ours, not Focus-N-Fix's: there the reward pulls everywhere, and the constraint holds
    against it."""
    return region * images + (1 - region) * images.detach()


def region_sheet(before: torch.Tensor, region: torch.Tensor, images: torch.Tensor) -> Image.Image:
    """What the constraint does, a column a picture: before, its problem region, now, and where it has changed.

    Args:
        before, images: (n, 3, H, W) in [0, 1].
        region: (n, 1, H, W).
    """
    columns = []
    for old, where, new in zip(before, region, images, strict=True):
        change = (new - old).abs().mean(dim=0)
        parts = [to_image(old, _HEIGHT), overlay(old, 0.5 * where[0], height=_HEIGHT), to_image(new, _HEIGHT)]
        parts.append(overlay(new, change, "misalignment", _HEIGHT))
        outside = float((change * (1 - where[0])).mean())
        columns.append(grid([[part] for part in [*parts, caption(f"outside {outside:.3f}", parts[0].width)]]))
    return grid([columns])
