"""Intervals for paired figures of several seeds: what claims about trainings rest on."""

from collections.abc import Iterator, Sequence

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
    means = np.array([table[rows].mean(axis=0) @ weights for rows, weights in _draws(*table.shape, seed)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(table.mean()), float(low), float(high)


def paired_ratio(
    above: Sequence[np.ndarray], below: Sequence[np.ndarray], level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the means of two figures and its interval, by the same bootstrap.

    Args:
        above, below: for each seed (P,), one figure a prompt; each list has its own seeds, drawn independently of the
            other's, and both the same P prompts.
        level: of the interval.

    Returns:
        ratio, low, high.
    """
    top, bottom = np.stack(above), np.stack(below)
    draws = zip(_draws(*top.shape, seed), _draws(*bottom.shape, seed + 1), strict=True)
    ratios = [(top[rows].mean(axis=0) @ weights) / (bottom[others].mean(axis=0) @ weights)
              for (rows, weights), (others, _) in draws]  # fmt: skip
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(top.mean() / bottom.mean()), float(low), float(high)


def _draws(seeds: int, prompts: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`DRAWS` times: which seeds are drawn, and each prompt's weight."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        rows = rng.integers(seeds, size=seeds)
        yield rows, rng.multinomial(prompts, np.full(prompts, 1 / prompts)) / prompts
