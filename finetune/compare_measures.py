"""What the figures of a comparison say. Pure functions of numbers, NumPy in and out.

A training's gain is judged on P held-out prompts, from the same noise as the base's; S trainings differ in their seeds.
A table of S x P gains (or differences of two entrants' gains) has three parts of variance: seeds, prompts, and what is
left. Intervals are bootstrap ones over seeds and prompts (`finetune.paired`). A bootstrap of few seeds is too sure of
itself, so its interval is widened by Student's t over the normal quantile, at Satterthwaite's degrees of freedom; the
p-value is of the same t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.paired import paired_interval

LEVEL, POWER = 0.95, 0.8
FEWEST_SEEDS = 3
"""Fewer say nothing of how far seeds differ, so there are no intervals then."""
MOST_SEEDS = 1000
"""More are not counted: a difference that needs them is none."""


@dataclass(frozen=True)
class Parts:
    """Variances of a table of S x P differences, by the analysis of variance of two crossed random effects.

    Attributes:
        seeds, prompts, rest: of one seed's effect, one prompt's, and one cell beside these; never negative.
        degrees: of freedom of the mean's variance, Satterthwaite's.
    """

    seeds: float
    prompts: float
    rest: float
    degrees: float

    def variance(self, seeds: int, prompts: int) -> float:
        """Of the mean over so many of each."""
        return self.seeds / seeds + self.prompts / prompts + self.rest / (seeds * prompts)


@dataclass(frozen=True)
class Difference:
    """A mean gain, or the mean difference of two.

    Attributes:
        low, high: ends of the 95% interval; None with fewer than `FEWEST_SEEDS` seeds, as is `p`.
        p: two-sided, that there is none.
        more_seeds: how many more seeds would show a difference of `smallest` (by default, of this size) with a chance
            of `POWER`; 0 if these do; None if no number of them would with these prompts, or none was counted.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    prompts: int
    more_seeds: int | None = None


def variance_parts(table: np.ndarray) -> Parts:
    """Of differences (S, P), S and P at least 2.

    With mean squares MS of seeds, prompts and rest, (MS_seeds - MS_rest) / P estimates the seeds' variance, and so on
    (Searle, Casella, McCulloch, "Variance Components", 1992, chapter 4).
    """
    seeds, prompts = table.shape
    by_seed, by_prompt = table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_prompt + table.mean()
    ms_rest = float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))
    ms_seeds = max(float(prompts * by_seed.var(ddof=1)), ms_rest)
    ms_prompts = max(float(seeds * by_prompt.var(ddof=1)), ms_rest)
    parts = (ms_seeds, seeds - 1), (ms_prompts, prompts - 1), (ms_rest, (seeds - 1) * (prompts - 1))
    below = sum(square**2 / degrees for square, degrees in parts)
    degrees = (ms_seeds + ms_prompts - ms_rest) ** 2 / below if below > 0 else float(seeds - 1)
    return Parts((ms_seeds - ms_rest) / prompts, (ms_prompts - ms_rest) / seeds, ms_rest, degrees)


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
    error = parts.variance(seeds, prompts) ** 0.5
    _, low, high = paired_interval(list(table), level)
    tail = (1 + level) / 2
    wider = float(stats.t.ppf(tail, parts.degrees) / stats.norm.ppf(tail))
    without_error = 1.0 if value == 0 else 0.0
    p = float(2 * stats.t.sf(abs(value) / error, parts.degrees)) if error > 0 else without_error
    needed = seeds_needed(parts, prompts, smallest or abs(value), (1 - level) / tests)
    return Difference(
        value, value - wider * (value - low), value + wider * (high - value), p, seeds, prompts,
        None if needed is None else max(needed - seeds, 0),
    )  # fmt: skip


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


def band(tables: np.ndarray, draws: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high of L looks at S trainings on P prompts, (S, L, P) -> (L,) each; the ends are NaN with fewer
    than `FEWEST_SEEDS` seeds."""
    seeds, looks, prompts = tables.shape
    mean = tables.mean(axis=(0, 2))
    if seeds < FEWEST_SEEDS:
        return mean, np.full(looks, np.nan), np.full(looks, np.nan)
    rng = np.random.default_rng(0)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts
    drawn = np.einsum("ds,slp,dp->dl", by_seed, tables, by_prompt, optimize=True)
    tail = (1 + LEVEL) / 2
    low, high = np.quantile(drawn, [1 - tail, tail], axis=0)
    degrees = np.array([variance_parts(tables[:, look]).degrees for look in range(looks)])
    wider = stats.t.ppf(tail, degrees) / stats.norm.ppf(tail)
    return mean, mean - wider * (mean - low), mean + wider * (high - mean)


def rank_of_worst(change: np.ndarray) -> np.ndarray:
    """Places of prompts, the one first on which an entrant lost most: (E, P) -> (P,)."""
    return np.argsort(change.min(axis=0), kind="stable")
