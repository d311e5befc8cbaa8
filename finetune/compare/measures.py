"""What the figures of a comparison say. Pure functions of numbers, NumPy in and out.

A training's gain is judged on P held-out prompts, from the same noise as the base's; S trainings differ in their seeds.
Intervals and p-values of a table of S x P gains, or of differences of two entrants' gains, are those of
`finetune.paired`: an interval leaves out 0 where its p-value is below the level's, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.paired import Parts, paired_interval, variance_parts

LEVEL, POWER = 0.95, 0.8
FEWEST_SEEDS = 3
"""Fewer say nothing of how far seeds differ, so there are no intervals then."""
MOST_SEEDS = 1000
"""More are not counted: a difference that needs them is none."""


@dataclass(frozen=True)
class Difference:
    """A mean gain, or the mean difference of two.

    Attributes:
        low, high: ends of the 95% interval; None with fewer than `FEWEST_SEEDS` seeds, as is `p`.
        p: two-sided, that there is none.
        more_seeds: how many more seeds would show a difference of `smallest` (by default, of this size) with a chance
            of `POWER`; 0 if these do; None if no number of them would with these prompts, or none was counted.
        smallest: the difference that matters, if one was named and there is an interval.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    prompts: int
    more_seeds: int | None = None
    smallest: float | None = None


def difference(table: np.ndarray, smallest: float | None = None, tests: int = 1, level: float = LEVEL) -> Difference:
    """What differences (S, P) say, P at least 2.

    Args:
        tests: how many p-values are corrected together; seeds are counted for the hardest case, Bonferroni's.
        smallest: the difference that `more_seeds` is counted for; None: the one that was found.
        level: that intervals hold with, and that a difference is to be shown at.
    """
    seeds, prompts = table.shape
    value = float(table.mean())
    if seeds < FEWEST_SEEDS:
        return Difference(value, None, None, None, seeds, prompts)
    parts = variance_parts(table)
    _, low, high = paired_interval(list(table), level)
    without_error = 1.0 if value == 0 else 0.0
    p = float(2 * stats.t.sf(abs(value) / parts.error, parts.degrees)) if parts.error > 0 else without_error
    needed = seeds_needed(parts, prompts, smallest or abs(value), (1 - level) / tests)
    more = None if needed is None else max(needed - seeds, 0)
    return Difference(value, low, high, p, seeds, prompts, more, smallest)


def seeds_needed(
    parts: Parts, prompts: int, effect: float, alpha: float = 1 - LEVEL, power: float = POWER
) -> int | None:
    """The fewest seeds whose mean over `prompts` prompts shows `effect` at `alpha` with a chance of `power`.

    None where no number up to `MOST_SEEDS` does: then the prompts' own variance is in the way, or there is no effect.
    """
    if effect <= 0:
        return None
    count = np.arange(FEWEST_SEEDS, MOST_SEEDS + 1)
    degrees = count - 1  # as if all of it were the seeds'; no seed too few
    error = np.sqrt(parts.seeds / count + parts.prompts / prompts + parts.rest / (count * prompts))
    enough = (stats.t.ppf(1 - alpha / 2, degrees) + stats.t.ppf(power, degrees)) * error <= effect
    return int(count[enough][0]) if enough.any() else None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Holm 1979).

    Example: 0.01, 0.04, 0.03 become 3 * 0.01, and then 2 * 0.03 for both others, which must not be below it.
    """
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected.tolist()


def band(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high of L looks at S trainings on P prompts, (S, L, P) -> (L,) each; the ends are NaN with fewer
    than `FEWEST_SEEDS` seeds."""
    looks = tables.shape[1]
    if len(tables) < FEWEST_SEEDS:
        return tables.mean(axis=(0, 2)), np.full(looks, np.nan), np.full(looks, np.nan)
    mean, low, high = zip(*(paired_interval(list(tables[:, look]), LEVEL) for look in range(looks)), strict=True)
    return np.array(mean), np.array(low), np.array(high)


def rank_of_worst(change: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Places of prompts, the one first on which an entrant lost most: (E, P) -> (P,).

    Args:
        change: of the pictures that are shown.
        gains: the same of all pictures and seeds, which decide where `change` does not: of a yes or no there are many
            alike.
    """
    return np.lexsort((gains.min(axis=0), change.min(axis=0)))
