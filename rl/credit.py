"""Where in a picture its advantage acts. Pure functions.

Shapes: N pictures in groups of G pictures of one prompt, H x W pixels, h x w the latent grid.

The objective comes first: R = total - mean over places of every penalty map m (`Reward.objective`). A = z(R) within the
group, s its std. The kinds of credit differ in what the log-prob at a place (h, w) is multiplied by:

    scalar   z(total)                            the penalty maps are ignored
    image    A                                   everywhere
    focus    A * F(h, w)                         F of mean 1 over places, from the picture's own maps or content
    words    A * F(h, w)                         F from where the misrepresented words' attention was
    paid     (total - its mean) / s - P(h, w)    each place pays for its own penalty (and its neighbourhood's)
    mask     A * F(h, w)                         F as 1 - m(h, w) / max m: DenseFlow-GRPO's, for comparison

F never depends on the sign of A. If it did (defects where A < 0, everything where A > 0), drawing less would pay: a
penalty can be paid only where something is drawn, and training soon empties the pictures. `paid` has two scales:

    objective   P = sum over the places q near (h, w) of (m_q - its mean over the group) / (h * w * s)
    unit        P = w * z over the group of m(h, w)          BoxFlow-GRPO's; it falls into that trap

The first keeps the objective: where what is drawn at a place decides the penalties near it and no others, its gradient
is that of `image` without the noise of all other places; if "near" is everywhere, it is `image`. The second counts each
place's penalty about h * w times as much as the objective does.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

CREDITS = ("scalar", "image", "focus", "words", "paid", "mask")
FOCUSES = ("maps", "content")
PAID_SCALES = ("objective", "unit")


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


def word_map(
    attention: torch.Tensor, positions: Sequence[Sequence[Sequence[int]]], penalties: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Where the words that a picture gets wrong were looked for.

    Args:
        attention: (N, L, h, w) >= 0, how much each place attended to each of L text positions.
        positions: for each picture, for each word of its prompt, the text positions of the word's pieces (none where
            the prompt was cut off).
        penalties: for each picture (T,) >= 0, what each of its T words costs.

    Returns:
        (N, h, w) >= 0: the words' attention, each of mean 1 over places, times their penalties; 0 where no word is
        penalised.

    Raises:
        ValueError: a picture has another number of penalties than its prompt has words.
    """
    found = attention.new_zeros(len(attention), *attention.shape[-2:])
    for picture, (words, costs) in enumerate(zip(positions, penalties, strict=True)):
        if len(words) != len(costs):
            raise ValueError(
                f"the reward has {len(costs)} word penalties for a prompt of {len(words)} words; "
                "there must be one for each word of reward.feedback.tokenize(prompt)"
            )
        for pieces, cost in zip(words, costs.tolist(), strict=True):
            if pieces and cost > 0:
                looked = attention[picture, list(pieces)].mean(dim=0)
                found[picture] += cost * looked / looked.mean().clamp(min=torch.finfo(looked.dtype).tiny)
    return found


def focus_weights(maps: torch.Tensor, floor: float) -> torch.Tensor:
    """F(h, w) from maps (N, h, w) >= 0: `floor` everywhere, the rest shared out as the map is; mean 1 over places.

    A constant map, the empty one included, gives 1 everywhere, which makes `focus` equal to `image`.

    Args:
        floor: in [0, 1], weight of a place where the map is zero; 1 switches the focus off.
    """
    means = maps.float().mean(dim=(-2, -1), keepdim=True)
    shares = torch.where(means > 0, maps / means.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return floor + (1 - floor) * shares


def mask_weights(maps: torch.Tensor, largest: float) -> torch.Tensor:
    """1 - m / `largest`, of maps (N, h, w) in [0, largest], brought to mean 1 over places: DenseFlow-GRPO's factor.

    With a negative advantage it *shields* what is defective from the blame; here for comparison.
    """
    return focus_weights((largest - maps).clamp(min=0), floor=0.0)


def paid_credit(
    totals: torch.Tensor, maps: torch.Tensor, group_size: int, std_floor: float, reach: int
) -> torch.Tensor:
    """`paid` at the scale of the objective (see the head of the file).

    Args:
        totals: (N,), without the penalties; the pictures of one prompt next to each other.
        maps: (N, h, w) >= 0, the penalties' sum, in the units of `totals`.
        std_floor: smallest std of the objective that is divided by.
        reach: a place pays for the penalties up to so many places away, along either axis; 0: for its own alone. From
            max(h, w) - 1 on, all credits are `image`'s.

    Returns:
        (N, h, w) float32, what the log-prob at each place is multiplied by.
    """
    totals, maps = totals.float().view(-1, group_size), maps.float()
    height, width = maps.shape[-2:]
    objective = totals - maps.mean(dim=(-2, -1)).view(-1, group_size)
    scale = objective.std(dim=1, correction=0).clamp(min=std_floor).repeat_interleave(group_size)
    groups = maps.view(-1, group_size, height, width)
    excess = (groups - groups.mean(dim=1, keepdim=True)).view(-1, 1, height, width)
    side = 2 * reach + 1
    near = F.avg_pool2d(F.pad(excess, (reach,) * 4), (side, 1), stride=1, divisor_override=1)
    near = F.avg_pool2d(near, (1, side), stride=1, divisor_override=1)[:, 0]  # sums over the square around each place
    better = (totals - totals.mean(dim=1, keepdim=True)).flatten()
    return (better[:, None, None] - near / (height * width)) / scale[:, None, None]


def unit_paid_credit(
    totals: torch.Tensor, maps: torch.Tensor, group_size: int, std_floor: float, weight: float
) -> torch.Tensor:
    """`paid` of unit size at each place, as BoxFlow-GRPO: z(total) + `weight` * z over the group of minus m(h, w).

    Args and result as `paid_credit`'s; `std_floor` is that of every std.
    """

    def standard(values: torch.Tensor) -> torch.Tensor:
        groups = values.float().view(-1, group_size, *values.shape[1:])
        centred = groups - groups.mean(dim=1, keepdim=True)
        return (centred / groups.std(dim=1, correction=0, keepdim=True).clamp(min=std_floor)).view(values.shape)

    return standard(totals)[:, None, None] - weight * standard(maps)
