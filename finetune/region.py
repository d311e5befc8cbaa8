"""Where a picture is to be drawn again, from maps of what is wrong with it; and how what is drawn is put in. Pure.

Shapes: H x W pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from reward.data import resize_maps


def region(
    maps: Mapping[str, torch.Tensor],
    thresholds: Mapping[str, float],
    size: tuple[int, int],
    dilate: float = 0.0,
    feather: float = 0.0,
) -> torch.Tensor:
    """How much of each pixel is to come from the new picture, (H, W) float32 in [0, 1].

    1 where a map is above its threshold, and at most `dilate` away from there; over the next `feather` it falls to 0.
    With a threshold passed at column 0 only, 8 columns, dilate 2/8 and feather 2/8 of the height 8: 1 1 1 .5 0 0 0 0.

    Args:
        maps: name -> (h, w), any resolution; stretched to `size`.
        thresholds: of some of the maps.
        size: (H, W).
        dilate, feather: shares of H (the disks that RichHF-18K's raters mark have a radius of 1/20).
    """
    found = np.zeros(size, bool)
    for name, threshold in thresholds.items():
        values = resize_maps(maps[name].detach().float().cpu()[None, None], size)[0, 0]
        found |= (values > threshold).numpy()
    if not found.any():
        return torch.zeros(size)
    distance = ndimage.distance_transform_edt(~found)
    dilate, feather = dilate * size[0], feather * size[0]
    share = (dilate + feather - distance) / feather if feather else distance <= dilate
    return torch.from_numpy(np.clip(share, 0, 1).astype(np.float32))


def put_in(picture: torch.Tensor, new: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`picture` with `share` of `new`; where the share is 0, it stays as it is, bit for bit.

    Args:
        picture: (3, H, W) uint8.
        new: (N, 3, H, W) float in [0, 1].
        share: (H, W) in [0, 1].

    Returns:
        (N, 3, H, W) uint8.
    """
    old = picture.float()
    mixed = (old + share * (new * 255 - old)).round().clamp(0, 255).byte()
    return torch.where(share > 0, mixed, picture)


def cells(share: torch.Tensor, size: tuple[int, int], factor: int) -> torch.Tensor:
    """The whole cells of the latent grid that a region touches: (H, W) -> (*size,) float32, 0 or 1.

    Pipelines shrink a mask to the latent grid by picking pixels; one that is the same all over a cell loses nothing.

    Args:
        size: of the pictures that the pipeline draws, multiples of `factor`.
    """
    touched = (share > 0).float()[None, None]
    if share.shape != size:
        touched = (F.interpolate(touched, size=size, mode="area") > 0).float()
    touched = F.max_pool2d(touched, factor)
    return touched.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)[0, 0]


def working_size(size: tuple[int, int], resolution: int | None, multiple: int) -> tuple[int, int]:
    """Height and width, multiples of `multiple`, at which a picture of `size` is drawn again.

    Args:
        resolution: side of the square of whose area it is to be, the shape kept: 512 x 768 at 512 becomes 416 x 624 or
            so. None: the picture's own size, rounded.
    """
    scale = 1.0 if resolution is None else resolution / (size[0] * size[1]) ** 0.5
    height, width = (max(round(side * scale / multiple), 1) * multiple for side in size)
    return height, width
