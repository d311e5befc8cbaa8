"""The picture of an evaluation: predicted against true scores, and the best and the worst heatmaps.

Shapes: N pictures, H x W pixels of one.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure

from reward import draw
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import score_metrics

HEIGHT = 160  # pixels of a picture as it is drawn


@dataclass(frozen=True)
class MapExample:
    """One picture with what is true and what is predicted of it.

    Attributes:
        image: (3, H, W) in [0, 1].
        true, predicted: heatmaps (h, w) in [0, 1]; any sizes.
        title: such as its CC and its prompt.
    """

    image: torch.Tensor
    true: torch.Tensor
    predicted: torch.Tensor
    title: str


def extremes(cc: np.ndarray, count: int = 3) -> tuple[list[int], list[int]]:
    """Places of the `count` best (best first) and worst (worst first) of `cc` (N,); NaN, an empty true map, is neither.

    No picture is both: where there are fewer than 2 * `count`, the better half is best.
    """
    ranked = [int(place) for place in np.argsort(-cc, kind="stable") if np.isfinite(cc[place])]
    return ranked[: min(count, (len(ranked) + 1) // 2)], ranked[::-1][: min(count, len(ranked) // 2)]


def report_figure(
    predicted: np.ndarray, true: np.ndarray, examples: Mapping[str, tuple[Sequence[MapExample], Sequence[MapExample]]]
) -> Figure:
    """A scatter plot for each score; below, for each heatmap, its best and worst pictures.

    Args:
        predicted, true: scores (N, 4) in [0, 1].
        examples: name of `HEATMAPS` -> best and worst examples; either may be empty.
    """
    shown = [name for name in HEATMAPS if any(examples.get(name, ((), ())))]
    heights = [3.6] + [1.9 * max(map(len, examples[name])) + 0.6 for name in shown]
    sheet = Figure(figsize=(14, sum(heights)), layout="constrained")
    parts = sheet.subfigures(1 + len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    _scatter(parts[0], predicted, true)
    for part, name in zip(parts[1:], shown, strict=True):
        _draw_examples(part, name, *examples[name])
    return sheet


def save_png(sheet: Figure, file: str | Path | BinaryIO) -> None:
    """Write the figure; characters that the font lacks, in prompts, are drawn as boxes without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        sheet.savefig(file, format="png", dpi=90)


def _scatter(part: SubFigure, predicted: np.ndarray, true: np.ndarray) -> None:
    for index, (axes, name) in enumerate(zip(part.subplots(1, len(SCORES)), SCORES, strict=True)):
        found = score_metrics(predicted[:, index], true[:, index])
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axes.scatter(true[:, index], predicted[:, index], s=8, alpha=0.4, edgecolors="none")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="raters", aspect="equal")
        axes.set_ylabel("predicted" if index == 0 else "")
        axes.set_title(f"{name}: PLCC {found['plcc']:.3f}, SRCC {found['srcc']:.3f}", fontsize=10)


def _draw_examples(part: SubFigure, name: str, best: Sequence[MapExample], worst: Sequence[MapExample]) -> None:
    """Best on the left, worst on the right; each example is picture, true map, predicted map."""
    part.suptitle(f"{name}: pictures with the best (left) and the worst (right) CC", fontsize=11)
    grid = part.subplots(max(len(best), len(worst)), 2, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, examples in enumerate((best, worst)):
        for axes, example in zip(grid[:, column], examples, strict=False):
            pictures = [draw.to_image(example.image, HEIGHT)]
            pictures += [draw.overlay(example.image, side, name, HEIGHT) for side in (example.true, example.predicted)]
            axes.imshow(draw.to_array(draw.grid([pictures])))
            axes.set_title(f"{_shortened(example.title)}\npicture, raters, predicted", fontsize=8, parse_math=False)


def _shortened(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
