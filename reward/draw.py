"""Pictures of rich feedback: heatmaps over images, struck-out words, grids; pure, PIL images in and out.

Text is set with the DejaVu font that matplotlib ships. Shapes: H x W pixels.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from reward.feedback import HEATMAPS, SCORES, RichFeedback

_COLOURS = {"implausibility": "inferno", "misalignment": "viridis"}
_SLIMMEST = 8
_STRUCK = (200, 30, 30)
_INK = (30, 30, 30)


def to_image(image: torch.Tensor, height: int | None = None) -> Image.Image:
    """A picture (3, H, W) in [0, 1] (clipped to it) as an RGB image, enlarged or shrunk to `height` if given.

    So scaled, one that is more than `_SLIMMEST` times as wide as high, or as high as wide, is drawn as if it were not:
    a strip of one pixel would have no width, or fill the memory.
    """
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    drawn = Image.fromarray(array)
    if height is None or height == drawn.height:
        return drawn
    width = round(drawn.width * height / drawn.height)
    width = min(max(width, -(-height // _SLIMMEST)), height * _SLIMMEST)
    return drawn.resize((width, height), Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """An image as uint8 (H, W, 3), as TensorBoard's `add_image(..., dataformats="HWC")` takes it."""
    return np.asarray(image.convert("RGB"))


def heatmap_image(heatmap: torch.Tensor) -> Image.Image:
    """A heatmap (H, W) in [0, 1] as a one-channel image, 0..255."""
    return Image.fromarray((heatmap.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy())


def overlay(image: torch.Tensor, heatmap: torch.Tensor, name: str = "implausibility", height: int | None = None):
    """A heatmap (h, w) in [0, 1] over its picture (3, H, W): the higher, the less of the picture is seen.

    `name` chooses the colours (of `rich.misalignment`, its last part). Returns an RGB image of the picture's size, or
    of `height` pixels.
    """
    base = to_image(image, height)
    strength = heatmap_image(heatmap).resize(base.size, Image.Resampling.BILINEAR)
    values = np.asarray(strength, dtype=np.float32)[..., None] / 255
    colours = colormaps[_COLOURS.get(name.rpartition(".")[2], "inferno")](0.25 + 0.75 * values[..., 0])[..., :3] * 255
    grey = np.asarray(base, dtype=np.float32)
    share = 0.85 * np.sqrt(values)  # the root keeps weak marks visible
    return Image.fromarray((grey * (1 - share) + colours * share).round().astype(np.uint8))


def struck_text(
    tokens: Sequence[str], misaligned: Sequence[float], width: int, threshold: float = 0.5, size: int = 12
) -> Image.Image:
    """The words of a prompt, wrapped to `width` pixels; those whose probability is above `threshold` are struck out."""
    font = _font(size)
    space, line = font.getlength(" "), round(size * 1.4)
    places, x, y = [], 0.0, 0
    for token in tokens:
        length = font.getlength(token)
        if x > 0 and x + length > width:
            x, y = 0.0, y + line
        places.append((x, y, length))
        x += length + space
    drawn = Image.new("RGB", (width, y + line), "white")
    pen = ImageDraw.Draw(drawn)
    for token, probability, (x, y, length) in zip(tokens, misaligned, places, strict=True):
        struck = float(probability) > threshold
        pen.text((x, y), token, font=font, fill=_STRUCK if struck else _INK)
        if struck:
            middle = y + size * 0.68
            pen.line((x, middle, x + length, middle), fill=_STRUCK, width=max(size // 8, 1))
    return drawn


def feedback_panel(
    image: torch.Tensor, feedback: RichFeedback, index: int, threshold: float = 0.5, height: int = 160
) -> Image.Image:
    """One picture (3, H, W) with its feedback: picture and overlays side by side, words struck out and scores below."""
    pictures = [to_image(image, height)]
    pictures += [overlay(image, feedback.heatmaps[name][index], name, height) for name in HEATMAPS]
    row = grid([pictures])
    words = struck_text(feedback.tokens[index], feedback.misaligned[index].tolist(), row.width, threshold)
    scores = [f"{name} {float(feedback.scores[name][index]):.2f}" for name in SCORES]
    return grid([[row], [words], [caption("   ".join(scores), row.width)]])


def caption(text: str, width: int, size: int = 11) -> Image.Image:
    """Plain text, wrapped to `width` pixels."""
    return struck_text(text.split(" "), [0.0] * len(text.split(" ")), width, size=size)


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Images in rows, left-aligned, `gap` pixels of white between and around them."""
    heights = [max(image.height for image in row) for row in rows]
    width = max(sum(image.width + gap for image in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) + 1)), "white")
    y = gap
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + gap
        y += height + gap
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
