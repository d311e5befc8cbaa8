"""Signs that a policy games its reward: it draws less, or always the same. Pure functions; limits are in
`rl.watch_limits`.

Shapes: N pictures of H x W pixels in groups of G of one prompt.
"""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from reward.draw import to_image

_QUALITY = 95  # of a JPEG; as the compressibility reward of "Training Diffusion Models with RL", arXiv 2305.13301


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

    The distance of two pictures is the root mean square difference of their pixels, in [0, 1]. NaN for G = 1. Features
    (N, D) may take the place of pictures.
    """
    groups = images.flatten(1).view(-1, group_size, images[0].numel())
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5  # (N / G, G, G)
    pairs = group_size * (group_size - 1)
    return distances.sum(dim=(1, 2)) / pairs if pairs else distances.new_full((len(groups),), float("nan"))


def file_size(images: torch.Tensor) -> torch.Tensor:
    """How much there is to say about a picture: (N, 3, H, W) in [0, 1] -> (N,), bytes of it as a JPEG, less those of an
    empty one; next to 0 if it is of one colour. Noise weighs much, smooth shapes little."""
    empty = _jpeg_bytes(Image.new("RGB", (images.shape[-1], images.shape[-2]), "grey"))
    return torch.tensor([float(max(_jpeg_bytes(to_image(image)) - empty, 0)) for image in images], device=images.device)


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.tell()


def map_entropy(maps: torch.Tensor) -> torch.Tensor:
    """How evenly maps (N, H, W) >= 0 are spread over places: (N,) in [0, 1]; 1 for a constant map, the empty one
    included, 0 for a single place. The entropy of map / sum, divided by its largest value, log(H * W)."""
    places = maps.float().flatten(1)
    if places.shape[1] == 1:
        return torch.ones_like(places[:, 0])
    total = places.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, places / total.clamp(min=torch.finfo(torch.float32).tiny), 1 / places.shape[1])
    return torch.special.entr(shares).sum(dim=1) / math.log(places.shape[1])


def saturation(
    terms: Mapping[str, torch.Tensor], ranges: Mapping[str, tuple[float, float]], margin: float = 1e-2
) -> torch.Tensor:
    """Share of each picture's terms that are within `margin` of an end of their range, in units of its length.

    Args:
        terms: name -> (N,).
        ranges: name -> (lowest, highest); at least one of `terms`. Terms without a range do not count.

    Returns:
        (N,) in [0, 1].
    """
    at_end = []
    for name, (low, high) in ranges.items():
        if name in terms:
            place = (terms[name].float() - low) / (high - low)
            at_end.append((place - 0.5).abs() >= 0.5 - margin)
    return torch.stack(at_end).float().mean(dim=0)


def dead_groups(values: torch.Tensor, group_size: int, std_floor: float) -> float:
    """Share of the groups whose values (N,) have a std (population's) below `std_floor`: they teach next to nothing."""
    return float((values.float().view(-1, group_size).std(dim=1, correction=0) < std_floor).float().mean())


def agreement(first: torch.Tensor, second: torch.Tensor, group_size: int) -> tuple[float, float]:
    """Whether two rewards (N,), (N,) prefer the same of a prompt's pictures: mean over prompts of their correlation
    among the G >= 2 pictures of one, in [-1, 1]; where one of them sees no difference, 0. What all pictures of a prompt
    have in common does not touch it.

    Returns:
        it, and its standard error: what prompts differ by tells it, if that is more than what chance alone makes of the
        correlation of G independent pairs, whose variance is 1 / (G - 1).
    """
    groups = [values.double().view(-1, group_size) for values in (first, second)]
    a, b = (values - values.mean(dim=1, keepdim=True) for values in groups)
    scale = a.norm(dim=1) * b.norm(dim=1)
    # Rewards are float32: what differs by less than this is rounding, and no preference.
    told = (a.norm(dim=1) > 1e-6 * groups[0].norm(dim=1)) & (b.norm(dim=1) > 1e-6 * groups[1].norm(dim=1))
    found = torch.where(told, (a * b).sum(dim=1) / torch.where(told, scale, torch.ones_like(scale)), 0.0)
    spread = max(float(found.std()) if len(found) > 1 else 0.0, (group_size - 1) ** -0.5)
    return float(found.mean()), spread / len(found) ** 0.5


def standard_error(values: torch.Tensor, group_size: int) -> float:
    """Of the mean of (N,) values; what varies at random are the groups, so it is taken over their means."""
    means = values.float().view(-1, group_size).mean(dim=1)
    if len(means) < 2:  # one group does not say how groups vary
        means = values.float()
    return float(means.std() / len(means) ** 0.5)


def paired_fall(before: Sequence[float], after: Sequence[float], choices: int = 1) -> float | None:
    """The mean of `after` less `before`, of the same P prompts, in standard errors: Student's t of P - 1 degrees of
    freedom, as the number that a normal variable is above, or below, as seldom; between -37 and 37. None for fewer
    than two prompts, or where their counts differ.

    Args:
        choices: `before` was chosen among so many, so that what happens is taken for so many times as likely
            (Bonferroni).
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    differences = np.subtract(after, before)
    mean, error = differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5
    chance = stats.t.sf(abs(mean) / max(error, 1e-12), len(differences) - 1)
    return float(np.copysign(stats.norm.isf(min(max(choices * chance, 1e-300), 0.5)), mean))
