"""How good a picture was compared with its group, and where in it that should count. Pure functions.

Shapes: N pictures in groups of G pictures of one prompt, H x W pixels, h x w the latent grid.

The objective comes first: R = total - mean over places of every penalty map (`Reward.objective`). The kinds of credit
differ in what is compared and in *where* the advantage A acts; the weight of the log-prob at a place is

    scalar   z(total)               the penalty maps are ignored
    image    A = z(R)               everywhere
    focus    A * F(h, w)            F of mean 1 over places, from the picture's own maps or content

F never depends on the sign of A. If it did (defects where A < 0, everything where A > 0), drawing less would pay: a
penalty can be paid only where something is drawn, and training soon empties the pictures.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F

CREDITS = ("scalar", "image", "focus")
FOCUSES = ("maps", "content")


def group_advantages(
    values: torch.Tensor,
    group_size: int,
    std_floor: float,
    clip: float | None = None,
    scale: Literal["group", "batch", "none"] = "group",
) -> torch.Tensor:
    """z-score of each value within its group: A = (R - mean of the group) / max(std, `std_floor`).

    As in GRPO ("DeepSeekMath", Shao et al. 2024, arXiv 2402.03300, section 4.1), with a floor instead of a small
    addend: a group whose pictures are equally good says little, and its noise is not blown up.

    Args:
        values: (N,), the pictures of one prompt next to each other, N a multiple of `group_size`.
        group_size: G, at least 2.
        std_floor: smallest std (population's, dividing by G) that is divided by, in units of the reward.
        clip: advantages are clamped to +- this; None does not.
        scale: what the std is taken over: each group, the whole batch (root mean square of the differences from the
            group's mean), or "none": no division.

    Returns:
        (N,) float32, mean 0 in each group before clipping.
    """
    assert group_size >= 2, group_size
    assert len(values) % group_size == 0, (len(values), group_size)
    groups = values.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=std_floor)
    elif scale == "batch":
        centred = centred / centred.square().mean().sqrt().clamp(min=std_floor)
    advantages = centred.flatten()
    return advantages if clip is None else advantages.clamp(-clip, clip)


def to_latent_grid(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bring maps (N, H, W) to the latent grid (N, h, w): by area when shrinking, bilinearly when enlarging.

    Each axis by itself, so any aspect ratio works. The mean over places is preserved exactly: by the averaging where
    sizes divide, else by rescaling.
    """
    maps = maps.float().unsqueeze(1)
    means = maps.mean(dim=(-2, -1), keepdim=True)
    for height, width in ((size[0], maps.shape[-1]), (size[0], size[1])):
        enlarges = height > maps.shape[-2] or width > maps.shape[-1]
        if enlarges:
            maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
        else:
            maps = F.interpolate(maps, size=(height, width), mode="area")
    resized = maps.mean(dim=(-2, -1), keepdim=True)
    scale = torch.where(resized > 0, means / resized.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return (maps * scale).squeeze(1)


def content_map(images: torch.Tensor, softness: float = 0.1) -> torch.Tensor:
    """Where something is drawn: how far each pixel is from the picture's ground, in [0, 1].

    The ground is the median colour of the border (its outermost 1/16 on each side). A pixel whose largest channel
    difference from it is `softness` gets 0.5.

    Args:
        images: (N, 3, H, W) in [0, 1].

    Returns:
        (N, H, W).
    """
    height, width = images.shape[-2:]
    edge = max(1, min(height, width) // 16)
    inside = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    inside[edge : height - edge, edge : width - edge] = True
    ground = images[:, :, ~inside].median(dim=-1).values  # (N, 3)
    difference = (images - ground[:, :, None, None]).abs().amax(dim=1)
    return difference / (difference + softness)


def penalty_map(penalties: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor | None:
    """Sum of all penalty maps (N, H, W) on the latent grid -> (N, h, w); None if there are none."""
    maps = [to_latent_grid(penalty, size) for penalty in penalties.values()]
    return torch.stack(maps).sum(dim=0) if maps else None


def focus_weights(maps: torch.Tensor, floor: float) -> torch.Tensor:
    """F(h, w) from maps (N, h, w) >= 0: `floor` everywhere, the rest shared out as the map is; mean 1 over places.

    A constant map, the empty one included, gives 1 everywhere, which makes `focus` equal to `image`.

    Args:
        floor: in [0, 1], weight of a place where the map is zero; 1 switches the focus off.
    """
    means = maps.float().mean(dim=(-2, -1), keepdim=True)
    shares = torch.where(means > 0, maps / means.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return floor + (1 - floor) * shares
