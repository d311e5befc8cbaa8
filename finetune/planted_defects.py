"""Defects that anybody sees, planted in pictures: a reward that is worth training on prefers the picture without.

Which defect lands where depends on the picture and its number only. Shapes: B pictures of H x W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

Planted = tuple[torch.Tensor, list[str]]
"""Pictures (B, 3, H, W) and their prompts, of which one or the other is wrong."""
SMEAR, BLOTCH = 0.16, 0.1
"""Radii of what is planted, shares of a picture's shorter side."""


def smear(images: torch.Tensor, prompts: Sequence[str], numbers: Sequence[int], others: Sequence[str]) -> Planted:
    """Where most is drawn, the pixels of a disk are shuffled in blocks: what was there is broken, its colours stay."""
    return torch.stack([_smeared(image, number) for image, number in zip(images, numbers, strict=True)]), list(prompts)


def blotch(images: torch.Tensor, prompts: Sequence[str], numbers: Sequence[int], others: Sequence[str]) -> Planted:
    """A disk of the colour that is furthest from the picture's mean, anywhere."""
    return torch.stack([_blotched(image, number) for image, number in zip(images, numbers, strict=True)]), list(prompts)


def turned_colours(
    images: torch.Tensor, prompts: Sequence[str], numbers: Sequence[int], others: Sequence[str]
) -> Planted:
    """Red becomes green, green blue and blue red: colours that are asked for are wrong, outlines are sound."""
    return images.roll(1, dims=1), list(prompts)


def wrong_prompt(
    images: torch.Tensor, prompts: Sequence[str], numbers: Sequence[int], others: Sequence[str]
) -> Planted:
    """Another picture's prompt, from `others`; its own where there is no other."""
    chosen = []
    for prompt, number in zip(prompts, numbers, strict=True):
        different = [other for other in dict.fromkeys(others) if other != prompt] or [prompt]
        chosen.append(different[int(_rng(number).integers(len(different)))])
    return images, chosen


DEFECTS: dict[str, Callable[[torch.Tensor, Sequence[str], Sequence[int], Sequence[str]], Planted]] = {
    "smear": smear,
    "blotch": blotch,
    "turned colours": turned_colours,
    "wrong prompt": wrong_prompt,
}
"""Name -> what plants it in pictures (B, 3, H, W) with B prompts, given the pictures' numbers and all prompts."""


def _smeared(image: torch.Tensor, number: int) -> torch.Tensor:
    height, width = image.shape[-2:]
    radius = max(round(SMEAR * min(height, width)), 2)
    edges = F.pad((image[:, 1:, 1:] - image[:, :-1, :-1]).abs().sum(dim=0), (0, 1, 0, 1))
    columns = F.avg_pool2d(edges[None, None], (2 * radius + 1, 1), stride=1, padding=(radius, 0))  # one side, then
    around = F.avg_pool2d(columns, (1, 2 * radius + 1), stride=1, padding=(0, radius))[0, 0]  # the other: 2r, not r * r
    row, column = divmod(int(around.argmax()), width)
    block = max(radius // 4, 1)
    shuffled, disk = image.clone(), _disk(height, width, row, column, radius, image.device)
    corners = [
        (y, x)
        for y in range(max(row - radius, 0), min(row + radius, height - block) + 1, block)
        for x in range(max(column - radius, 0), min(column + radius, width - block) + 1, block)
    ]
    order = _rng(number).permutation(len(corners))
    for (y, x), place in zip(corners, order, strict=True):
        from_y, from_x = corners[place]
        shuffled[:, y : y + block, x : x + block] = image[:, from_y : from_y + block, from_x : from_x + block]
    return torch.where(disk, shuffled, image)


def _blotched(image: torch.Tensor, number: int) -> torch.Tensor:
    height, width = image.shape[-2:]
    radius = max(round(BLOTCH * min(height, width)), 1)
    rng = _rng(number)
    row, column = (int(rng.integers(radius, max(side - radius, radius + 1))) for side in (height, width))
    colour = (image.mean(dim=(1, 2)) < 0.5).to(image)
    return torch.where(_disk(height, width, row, column, radius, image.device), colour[:, None, None], image)


def _disk(height: int, width: int, row: int, column: int, radius: int, device: torch.device) -> torch.Tensor:
    """(H, W) bool."""
    y, x = torch.arange(height, device=device)[:, None] - row, torch.arange(width, device=device) - column
    return y * y + x * x <= radius * radius


def _rng(number: int) -> np.random.Generator:
    return np.random.default_rng([0, number])
