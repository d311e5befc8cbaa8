"""Matches the patches of a picture with the things that its caption asks for.

Masks are (S, S) bool, S = 64; lengths are in pixels, x runs right, y runs down.
"""

from itertools import pairwise, permutations

import numpy as np

from tinyworld.fit import Fit, cover
from tinyworld.grammar import Request
from tinyworld.segment import Patch

_FORMED = 0.7  # what is not asked for and matches its best shape less is debris, not an extra thing
_HIDDEN = 0.35  # what hides more of its best shape behind others is no extra thing
_INSET = 0.95  # what lies on another thing unasked and matches its best shape less is a blotch
_EXTRA_AREA = 45
_CANDIDATES = 7
_CHARITY = 0.06  # the shape asked for is believed if it matches nearly as well as the best


def fit_of(patch: Patch, shape: str) -> Fit | None:
    """The fit of one shape, or None where it matches too badly to have been tried."""
    return next((one for one in patch.fits if one.shape == shape), None)


def seen_as(patch: Patch, wanted: str) -> Fit:
    """The ideal shape that a patch shows to somebody who asked for `wanted`."""
    best, asked = patch.fits[0], fit_of(patch, wanted)
    # A spoiled outline may come to resemble another shape; a clean one is what it is.
    charity = _CHARITY + min(0.08, 1.2 * max(0.0, 0.93 - best.iou))
    return asked if asked and asked.iou >= best.iou - charity else best


def holds(relation: str, first: Fit, second: Fit, first_mask: np.ndarray) -> float:
    """How far two things stand in a relation, in [0, 1]; 0.5 where it begins to hold."""
    if relation == "inside":
        if first.radius > second.radius:
            return 0.0
        within = cover(second.shape, second.x, second.y, second.radius, second.play)[first_mask].mean()
        return float(np.clip((within - 0.4) / 0.4, 0, 1))
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation == "left of" else (down, right)
    return float(np.clip((along - 0.75 * abs(across) + 1) / 4, 0, 1))  # a person takes it less strictly than `related`


def _hosts(patches: list[Patch]) -> list[set[int]]:
    """For each patch, which larger things of another colour it lies on; two may lie on each other, to go by fits."""
    ideals = [one.ideal() if one.fits else one.mask for one in patches]
    return [
        {
            k
            for k, other in enumerate(patches)
            if other.colour != one.colour
            and ideals[k].sum() > one.area
            and (ideals[k] & one.mask).sum() > 0.6 * one.area
        }
        for one in patches
    ]


def match(request: Request, slots: list[int], patches: list[Patch]) -> tuple[list[Patch | None], list[Patch]]:
    """For each thing asked for the patch that answers it, or None; and well-formed patches that answer nothing.

    All assignments are tried: there are at most three things to find, and few patches.
    """
    patches = [one for one in patches if one.fits and one.iou >= 0.4][:_CANDIDATES]
    hosts = _hosts(patches)
    lying = [any(k not in hosts[host] for host in hosts[k]) for k in range(len(patches))]
    inset = [one.iou >= _INSET and one.behind is not None for one in patches]
    padded = [*patches, *([None] * len(slots))]
    largest = max((one.area for one in patches), default=1)

    def cost(slot: int, index: int) -> float:
        one = padded[index]
        if one is None:
            return 3.0
        noun = request.nouns[slots[slot]]
        fitting = seen_as(one, noun.shape)
        total = (one.colour != noun.colour) + (fitting.shape != noun.shape) + 0.3 * (1 - fitting.merit)
        inner = request.relation == "inside" and slot == 0
        total += 1.2 if lying[index] and not inner and not inset[index] else 0.0  # a blotch, rather
        return total + 0.1 * (1 - one.area / largest)  # of two alike, the smaller is the extra one

    costs = [[cost(slot, index) for index in range(len(padded))] for slot in range(len(slots))]
    best, chosen = np.inf, tuple(range(len(patches), len(padded)))
    for order in permutations(range(len(padded)), len(slots)):
        if any(padded[a] is None and padded[b] is None and a > b for a, b in pairwise(order)):
            continue  # the empty answers are alike
        total = sum(costs[slot][index] for slot, index in enumerate(order))
        if total >= best:
            continue
        if request.relation:
            one, other = (padded[index] for index in order[:2])
            if one and other:
                fits = [seen_as(p, request.nouns[k].shape) for k, p in enumerate((one, other))]
                total += 0.5 * (1 - holds(request.relation, *fits, one.mask))
        if total < best:
            best, chosen = total, order
    answers = [padded[index] for index in chosen]
    spare = [
        one
        for k, one in enumerate(patches)
        if k not in chosen
        and one.area >= _EXTRA_AREA
        and one.iou >= _FORMED
        and one.fits[0].hidden <= _HIDDEN
        and (inset[k] or (not hosts[k].intersection(chosen) and not lying[k]))
    ]
    return answers, spare
