"""Heatmaps that look at no picture; what a predictor must beat before its figures mean anything.

Shapes: h x w a heatmap's pixels. Every baseline is (2, h, w) in [0, 1], in the order of `HEATMAPS`.
"""

import torch
from datasets import Dataset

from reward.checks import read_rows
from reward.data import resize_maps, to_tensor
from reward.feedback import HEATMAPS

CENTRE_WIDTH = 0.25
"""Standard deviation of the centre prior, as a share of the side."""


def mean_maps(split: Dataset, size: tuple[int, int]) -> torch.Tensor:
    """(2, *size), the mean heatmaps of a split of at least one row, in the order of `HEATMAPS`."""
    wanted = {"uid", *(f"{name}_map" for name in HEATMAPS)}
    columns = split.select_columns([name for name in split.column_names if name in wanted])
    total = torch.zeros(2, *size, dtype=torch.float64)
    for row in read_rows(columns):
        maps = [to_tensor(row[f"{name}_map"], "L").float() / 255 for name in HEATMAPS]
        total += torch.cat([resize_maps(heatmap[None], size)[0] for heatmap in maps])
    return (total / len(columns)).float()


def map_baselines(mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> (2, h, w); `mean` (2, h, w) are the mean maps of the pictures that one may learn from.

    all zero: nothing is ever wrong. Hard to beat in MSE, as most pixels are 0.
    constant: the mean map's mean everywhere, the best constant in MSE.
    mean map: `mean`.
    centre prior: a Gaussian of standard deviation `CENTRE_WIDTH` about the middle, stretched to the picture's shape as
        all maps are (Bylinskii et al., arXiv 1604.03605, section 3), and as high as fits `mean` best (least squares).
    """
    down, across = ((torch.arange(side) + 0.5) / side - 0.5 for side in mean.shape[-2:])
    bell = torch.exp(-(down[:, None] ** 2 + across**2) / (2 * CENTRE_WIDTH**2))  # (h, w)
    height = (mean * bell).sum((1, 2), keepdim=True) / (bell * bell).sum()
    return {
        "all zero": torch.zeros_like(mean),
        "constant": mean.mean((1, 2), keepdim=True).expand_as(mean),
        "mean map": mean,
        "centre prior": (height * bell).clamp(max=1),
    }
