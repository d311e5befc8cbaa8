"""Intervals for paired figures of several seeds: what a benchmark's claims rest on."""

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000


def paired_interval(
    differences: Sequence[np.ndarray], level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference and its bootstrap interval over seeds and prompts.

    Seeds and, across them, prompts are drawn again with replacement, independently (a two-way "pigeonhole" bootstrap,
    Owen 2007, arXiv 0712.1111): a prompt that is easy is easy in every run, so runs on the same prompts are not
    independent.

    Args:
        differences: for each seed (P,), one difference a prompt; the same P prompts for every seed.
        level: of the interval.

    Returns:
        mean, low, high.
    """
    table = np.stack(differences)  # (S, P)
    rng = np.random.default_rng(seed)
    seeds, prompts = table.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        rows = rng.integers(seeds, size=seeds)
        columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts))
        means[draw] = table[rows].mean(axis=0) @ columns / prompts
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(table.mean()), float(low), float(high)
