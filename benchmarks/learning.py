"""What learning curves of several seeds say: when a level is reached, and how sure that is.

Shapes: S seeds, L looks at a training, P prompts.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import isotonic_regression

DRAWS = 2000
NOT_REACHED = 2.0
"""Stands for a share of the images, or of the time, at which a level is not reached within all of them."""


def smooth(curve: np.ndarray) -> np.ndarray:
    """The nearest curve (L,) that never falls: noise must not reach a level before the training does."""
    return isotonic_regression(curve).x


def reached(axis: np.ndarray, curve: np.ndarray, level: float) -> float:
    """Where on `axis` (L,), rising, the smoothed `curve` (L,) first is at `level`, straight lines between; inf: never.

    Example: at 0, 10 and 20 the curve is 1, 2 and 4; the level 3 is reached at 15.
    """
    rising = smooth(curve)
    place = int(np.searchsorted(rising, level))
    if place == len(rising):
        return float("inf")
    if place == 0:
        return float(axis[0])
    below, above = rising[place - 1], rising[place]
    return float(axis[place - 1] + (level - below) / (above - below) * (axis[place] - axis[place - 1]))


def share_needed(axis: np.ndarray, curve: np.ndarray, other: np.ndarray) -> float:
    """The share of `axis` (L,) at which `curve` is where `other` ends; `NOT_REACHED` if it never is, or if `other` has
    learned nothing."""
    if smooth(other)[-1] <= smooth(other)[0]:
        return NOT_REACHED
    return min(reached(axis, curve, smooth(other)[-1]) / axis[-1], NOT_REACHED)


def ratio_to_same_level(axis: np.ndarray, curve: np.ndarray, other_axis: np.ndarray, other: np.ndarray) -> float:
    """How much of its axis a curve takes to a level, over what another one takes of its own.

    The level is the highest that both reach: the lower one of the ends. `NOT_REACHED` where the other is there at its
    very start, for then neither has learned anything.
    """
    level = min(smooth(curve)[-1], smooth(other)[-1])
    taken, others = reached(axis, curve, level), reached(other_axis, other, level)
    return min(taken / others, NOT_REACHED) if others > 0 else NOT_REACHED


def mean_curve(curves: np.ndarray, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(S, L, P) -> (L,): the mean over the seeds `seeds` (indices) and over prompts by their shares `prompts` (P,)."""
    return curves[seeds].mean(axis=0) @ prompts


def resampled(
    of: Callable[[np.ndarray, np.ndarray], float], seeds: int, prompts: int, level: float = 0.95
) -> tuple[float, float, float]:
    """What `of` says of all seeds and prompts, and its bootstrap interval over both.

    Seeds and, across them, prompts are drawn again with replacement, independently (a two-way "pigeonhole" bootstrap,
    Owen 2007, arXiv 0712.1111). It is for figures that are no means, which have no closed form as
    `finetune.paired.paired_interval` is; of few seeds that differ much it is too sure.

    Args:
        of: is given indices of seeds, and each prompt's share of the mean; see `mean_curve`.
    """
    rng = np.random.default_rng(0)
    even = np.full(prompts, 1 / prompts)
    drawn = [of(rng.integers(seeds, size=seeds), rng.multinomial(prompts, even) / prompts) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(of(np.arange(seeds), even)), float(low), float(high)
