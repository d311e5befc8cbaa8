"""Signs that a policy games its reward: it draws less, or always the same. Pure functions.

Shapes: N pictures of H x W pixels in groups of G of one prompt.
"""

import torch
import torch.nn.functional as F


def edge_energy(images: torch.Tensor) -> torch.Tensor:
    """How much is drawn: mean absolute difference of neighbouring pixels, (N, 3, H, W) -> (N,); 0 if nothing is."""
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    horizontal = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    return vertical + horizontal


def thumbnails(images: torch.Tensor, size: int = 64) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 3, <= size, <= size), by area; what `diversity` is measured on, so that it costs little."""
    height, width = (min(size, side) for side in images.shape[-2:])
    return F.interpolate(images, size=(height, width), mode="area")


def diversity(images: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean pairwise distance of the pictures of one prompt: (N, 3, H, W), G next to each other -> (N / G,).

    The distance of two pictures is the root mean square difference of their pixels, in [0, 1]. NaN for G = 1.
    """
    groups = images.flatten(1).view(-1, group_size, images[0].numel())
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5  # (N / G, G, G)
    pairs = group_size * (group_size - 1)
    return distances.sum(dim=(1, 2)) / pairs if pairs else distances.new_full((len(groups),), float("nan"))
