"""Bootstrap intervals of the paper's metrics, over pictures; and one of a share that needs no draws.

N pictures are drawn again with replacement, `draws` times, and each metric is computed anew; its 95% interval is what
lies between the 2.5% and the 97.5% quantile of these (Efron's percentile interval). Pictures, not pixels or words, are
drawn: those of one picture are not independent. D draws.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

from reward.metrics import EPS

LEVEL = 0.95
_CHUNK = 2_000_000  # values drawn at once: 16 MB an array


@dataclass(frozen=True)
class Figure:
    """One metric.

    Attributes:
        value: None where the metric is defined for no picture.
        low, high: ends of its 95% interval; None where there is none.
        n: number of pictures that it is about.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def correlation_draws(said: np.ndarray, true: np.ndarray, draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`plcc` and `srcc`, each (D,), of N scores drawn again; 0 where a draw is constant, as in `score_metrics`."""
    rng, count = np.random.default_rng(seed), len(true)
    found = {"plcc": [], "srcc": []}
    rows = max(_CHUNK // max(count, 1), 1)
    for start in range(0, draws, rows):
        drawn = rng.integers(count, size=(min(rows, draws - start), count))
        a, b = said[drawn], true[drawn]  # (d, N)
        found["plcc"].append(_pearson_rows(a, b))
        found["srcc"].append(_pearson_rows(rankdata(a, axis=1), rankdata(b, axis=1)))
    return {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in found.items()}


def draw_counts(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """(D, N), how often each of N pictures is drawn; every row sums to N."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def mean_draws(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of (N,) `values` over the pictures drawn, for each row of `counts` (D, N); those that are NaN count for
    nothing. Draws that hold no picture with a value are left out, so there may be fewer than D."""
    there = np.isfinite(values)
    weight = counts @ there
    return (counts @ np.where(there, values, 0.0))[weight > 0] / weight[weight > 0]


def word_draws(tallies: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1`, each (D,); 0 where undefined, as in `word_metrics`.

    Args:
        tallies: (N, 3), of each picture: words rightly marked, words marked, words misaligned.
        counts: (D, N), as `draw_counts` gives them.
    """
    hits, marked, wrong = (counts @ tallies).T
    return {
        "precision": hits / np.maximum(marked, 1),
        "recall": hits / np.maximum(wrong, 1),
        "f1": 2 * hits / np.maximum(marked + wrong, 1),
    }


def figure(value: float | None, drawn: np.ndarray, n: int) -> Figure:
    """A metric with its interval; no interval where nothing was drawn, or for a single picture."""
    if n == 0:
        return Figure(None, n=0)
    if n < 2 or not drawn.size:
        return Figure(value, n=n)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, float(low), float(high), n)


def wilson(rate: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the interval of a share (Wilson 1927), which is never empty, also where all say the same. Answers with
    ties vary less than those it is made for, so it is a little wide for them."""
    z = float(norm.ppf((1 + level) / 2))
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (rate * (1 - rate) / count + z * z / (4 * count**2)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _pearson_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of (d, N) with that of the other; 0 where one is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    spread = np.sqrt((a * a).mean(axis=1)), np.sqrt((b * b).mean(axis=1))
    constant = np.minimum(*spread) <= EPS
    return np.where(constant, 0.0, (a * b).mean(axis=1) / np.where(constant, 1.0, spread[0] * spread[1]))
