"""Sheets of pictures with what the reward holds against them. PIL images out.

Shapes: n pictures of H x W pixels, T words of a prompt.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from PIL import Image

from reward.draw import caption, grid, overlay, struck_text, to_image
from reward.feedback import Reward, tokenize
from rl.experience import Samples

_HEIGHT = 128


def sample_sheet(samples: Samples) -> Image.Image:
    """Pictures in a row, what the reward marks in them below, prompts with wrong words struck out."""
    scale = full_strength([samples.reward])
    row = grid([[picture_column(samples, index, scale) for index in range(len(samples.prompts))]])
    return grid([[row], *legend(scale, row.width)])


def before_after_sheet(before: Samples, after: Samples) -> Image.Image:
    """The same prompts and noise before (upper row) and after (lower row), with overlays and struck-out words."""
    scale = full_strength([before.reward, after.reward])
    rows = []
    for title, samples in (("before", before), ("after", after)):
        columns = [picture_column(samples, index, scale) for index in range(len(samples.prompts))]
        row = grid([columns])
        rows += [[caption(title, row.width, size=16)], [row]]
    return grid([*rows, *legend(scale, row.width)])


def legend(names: Collection[str], width: int) -> list[list[Image.Image]]:
    """Rows of a grid: a line that says what the overlays below each picture are; none where there are none."""
    return [[caption(f"below each picture: {', '.join(names)}", width)]] if names else []


def shown_maps(reward: Reward | None) -> Mapping[str, torch.Tensor]:
    """What a sheet shows of a reward: its heatmaps, and its penalty maps of other names, as one of several rewards may
    have penalties alone."""
    if reward is None:
        return {}
    return {**reward.heatmaps, **{name: maps for name, maps in reward.penalties.items() if name not in reward.heatmaps}}


def full_strength(rewards: Sequence[Reward | None]) -> dict[str, float]:
    """The value of every map that is drawn at full strength: 1 of heatmaps, the largest of penalty maps."""
    scale: dict[str, float] = {}
    for reward in rewards:
        for name, maps in shown_maps(reward).items():
            scale[name] = 1.0 if name in reward.heatmaps else max(scale.get(name, 0.0), float(maps.max()))
    return scale


def picture_column(samples: Samples, index: int, scale: dict[str, float]) -> Image.Image:
    """One picture, its overlays, its prompt and its reward, if it has one, one below the other.

    Struck out are the words that the reward calls wrong (`Reward.wrong_words`), whatever they cost: a cost depends on
    the reward's weights and on the prompt's length, and says nothing by itself.
    """
    reward, image = samples.reward, samples.images[index]
    parts = [to_image(image, _HEIGHT)]
    for name, maps in shown_maps(reward).items():
        strength = maps[index] / scale[name] if scale[name] > 0 else torch.zeros_like(maps[index])
        parts.append(overlay(image, strength, name, _HEIGHT))
    words = tokenize(samples.prompts[index])
    wrong = None if reward is None or reward.wrong_words is None else reward.wrong_words[index]
    struck = [0.0] * len(words) if wrong is None or len(wrong) != len(words) else wrong.float().tolist()
    width = parts[0].width
    parts.append(struck_text(words, struck, width))
    if reward is not None:
        parts.append(caption(f"{float(reward.objective[index]):.3f}", width))
    return grid([[part] for part in parts])
