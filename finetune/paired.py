"""Intervals for paired figures of several seeds: what claims about trainings rest on.

S trainings that differ in their seeds are judged on the same P prompts. A table (S, P) of differences has three parts
of variance: seeds, prompts - one that is easy is easy in every run, so runs on the same prompts are not independent -,
and what is left of each cell. The mean's variance is estimated from the mean squares of two crossed random effects, and
its interval is Student's at Satterthwaite's degrees of freedom (Satterthwaite 1946; Searle, Casella, McCulloch,
"Variance Components", 1992, chapter 4). A bootstrap over seeds and prompts was left for it: of three seeds it is too
sure where seeds differ, and not sure enough where they do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

_WIDEST = 1e6
"""In units of the error of a ratio's upper part: an end that lies further away is none."""


@dataclass(frozen=True)
class Parts:
    """What a table (S, P) of differences says of its mean.

    Attributes:
        seeds, prompts, rest: variances of one seed's effect, one prompt's, and one cell beside these; never negative.
        error: standard error of the table's mean.
        degrees: of freedom of `error`.
    """

    seeds: float
    prompts: float
    rest: float
    error: float
    degrees: float


def variance_parts(table: np.ndarray) -> Parts:
    """Of differences (S, P), P at least 2.

    The mean's variance is (MS_seeds + MS_prompts - MS_rest) / (S * P). Where prompts do not differ beyond the cells'
    noise it is MS_seeds / (S * P), which makes the interval the t-test of the seeds' means. One seed says nothing of
    how seeds differ: it is then the t-test of the prompts.
    """
    seeds, prompts = table.shape
    if seeds == 1:
        spread = float(table.var(ddof=1))
        return Parts(0.0, spread, 0.0, (spread / prompts) ** 0.5, prompts - 1.0)
    by_seed, by_prompt = table.mean(axis=1), table.mean(axis=0)
    residual = table - by_seed[:, None] - by_prompt + table.mean()
    ms_rest = float((residual**2).sum() / ((seeds - 1) * (prompts - 1)))
    ms_seeds, ms_prompts = float(prompts * by_seed.var(ddof=1)), float(seeds * by_prompt.var(ddof=1))
    if ms_prompts <= ms_rest:
        total, degrees = ms_seeds, seeds - 1.0
    else:
        total = ms_seeds + ms_prompts - ms_rest
        parts = (ms_seeds, seeds - 1), (ms_prompts, prompts - 1), (ms_rest, (seeds - 1) * (prompts - 1))
        degrees = total**2 / sum(square**2 / count for square, count in parts)
    return Parts(
        seeds=max(ms_seeds - ms_rest, 0.0) / prompts,
        prompts=max(ms_prompts - ms_rest, 0.0) / seeds,
        rest=ms_rest,
        error=(total / table.size) ** 0.5,
        degrees=max(degrees, 1.0),
    )


def paired_interval(differences: Sequence[np.ndarray], level: float = 0.95) -> tuple[float, float, float]:
    """Mean difference and its interval over seeds and prompts; over prompts alone where there is one seed.

    Args:
        differences: for each seed (P,), one difference a prompt; the same P prompts for every seed, at least 2.
        level: of the interval.

    Returns:
        mean, low, high.
    """
    table = np.stack(differences)
    parts, mean = variance_parts(table), float(table.mean())
    half = float(stats.t.ppf((1 + level) / 2, parts.degrees)) * parts.error
    return mean, mean - half, mean + half


def paired_ratio(
    above: Sequence[np.ndarray], below: Sequence[np.ndarray], level: float = 0.95
) -> tuple[float, float, float]:
    """Ratio of the means of two figures, and all the ratios r at which `above` - r * `below` is not told from 0
    (Fieller 1954): its interval.

    Args:
        above, below: for each seed (P,), one figure a prompt; as many seeds in both, and the same P prompts.
        level: of the interval.

    Returns:
        ratio, low, high; an end is infinite where `below` itself is hardly told from 0. Where its mean is 0 there is no
        ratio, which is NaN.
    """
    top, bottom = np.stack(above), np.stack(below)
    if bottom.mean() == 0:
        return math.nan, -math.inf, math.inf
    ratio = float(top.mean() / bottom.mean())

    def told_apart(at: float) -> float:
        """Above 0 where it is."""
        _, low, high = paired_interval(top - at * bottom, level)
        return abs(low + high) / 2 - (high - low) / 2

    step = variance_parts(top - ratio * bottom).error / abs(float(bottom.mean()))
    if step == 0:
        return ratio, ratio, ratio

    def end(side: int) -> float:
        reach = 1.0
        while told_apart(ratio + side * reach * step) <= 0:
            reach *= 2
            if reach > _WIDEST:
                return side * float("inf")
        return float(optimize.brentq(told_apart, ratio + side * reach / 2 * step, ratio + side * reach * step))

    return ratio, end(-1), end(1)
