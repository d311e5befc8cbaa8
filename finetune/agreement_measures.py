"""How far raters of pictures agree, and how sure each is of itself. Pure functions of numbers, NumPy in and out.

A rater is a reward, or people. What a policy is trained on is the order of the pictures of one prompt, so agreement
within prompts is what counts before a training; across prompts raters may agree only because some prompts are hard.
Intervals are 95% ones by the bootstrap over prompts (Efron's percentile interval): the pictures of a prompt are not
independent of each other. Of a single prompt there is none. Shapes: R raters, N pictures, P prompts, D draws.
"""

import numpy as np
from scipy.stats import rankdata

from reward.intervals import Figure, draw_counts, figure, mean_draws, wilson

FELLOWS = 0.5
"""Where a smaller share of the pictures than this has another of its own prompt, pairs within prompts tell of too few
pictures, and those across prompts are worth a look too."""
_LEAST = 1e-12  # a spread of ranks or values below it is none
_BLOCK = 2_000_000  # pairs that are compared at once: 16 MB an array
_NONE = Figure(None, n=0)


def groups_of(prompts: list[str]) -> np.ndarray:
    """(N,) the number of each picture's prompt, 0..P-1 in order of first appearance."""
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([number[prompt] for prompt in prompts])


def rank_correlation(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of every two of R raters over N pictures: (R, N) -> (R, R), NaN where one is constant.

    Where a value is NaN, the picture does not count for that rater, nor for the others with it.
    """
    if np.isnan(values).any():
        there = np.isfinite(values)
        pairs = [[values[[one, other]][:, there[one] & there[other]] for other in range(len(values))]
                 for one in range(len(values))]  # fmt: skip
        return np.array([[rank_correlation(both)[0, 1] if both.size else np.nan for both in row] for row in pairs])
    ranks = rankdata(values, axis=1)
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks * ranks).sum(axis=1))
    spread = np.where(spread > _LEAST, spread, np.nan)
    return ranks @ ranks.T / (spread[:, None] * spread)


def within_prompts(values: np.ndarray, groups: np.ndarray, draws: int = 1000, seed: int = 0) -> list[list[Figure]]:
    """Mean over prompts of Spearman's correlation over a prompt's pictures, of every two raters: R x R figures.

    Args:
        values: (R, N).
        groups: (N,), as `groups_of` gives them.

    A prompt counts for two raters if neither says the same of all its pictures; `n` is the number of those prompts.
    """
    each = np.full((groups.max() + 1, len(values), len(values)), np.nan)  # (P, R, R)
    for group in range(len(each)):
        mine = groups == group
        if mine.sum() > 1:
            each[group] = rank_correlation(values[:, mine])
    counts = draw_counts(len(each), draws, seed)
    return [[_mean(each[:, one, other], counts) for other in range(len(values))] for one in range(len(values))]


def across_prompts(values: np.ndarray, groups: np.ndarray, draws: int = 200, seed: int = 0) -> list[list[Figure]]:
    """Spearman's correlation over all N pictures, of every two raters: R x R figures; None where one is constant."""
    whole, drawn = rank_correlation(values), []
    places = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        chosen = np.concatenate([places[group] for group in rng.integers(len(places), size=len(places))])
        drawn.append(rank_correlation(values[:, chosen]))
    drawn = np.stack(drawn) if drawn and len(places) > 1 else np.empty((0, *whole.shape))
    return [
        [_figure(whole[one, other], drawn[:, one, other], values.shape[1]) for other in range(len(values))]
        for one in range(len(values))
    ]


def pair_accuracy(said: np.ndarray, true: np.ndarray, groups: np.ndarray, draws: int = 1000, seed: int = 0) -> Figure:
    """How often a rater prefers, of two pictures of a prompt, the one that is truly better; 0.5 is chance.

    Args:
        said, true: (N,); higher is better; NaN where there is none, which does not count.
        groups: (N,), as `groups_of` gives them.

    Pairs that are truly equal do not count; a rater who says the same of both is half right. `n`: the number of pairs.
    """
    there = np.isfinite(said) & np.isfinite(true)
    said, true, groups, tallies = said[there], true[there], groups[there], np.zeros((groups.max() + 1, 2))
    for group in range(len(tallies)):
        mine = groups == group
        better = np.sign(true[mine][:, None] - true[mine])
        preferred = np.sign(said[mine][:, None] - said[mine])
        upper = np.triu(better != 0, 1)
        tallies[group] = ((1 + better * preferred) / 2)[upper].sum(), upper.sum()
    return _share(tallies, draws, seed)


def pair_accuracy_across(
    said: np.ndarray, true: np.ndarray, groups: np.ndarray, draws: int = 200, seed: int = 0
) -> Figure:
    """`pair_accuracy` among all pictures, whatever their prompts: for where most are alone with theirs.

    A rater may be right here because it knows which prompts are hard, which teaches a policy nothing. The interval is
    over prompts still, which is over pictures where each has a prompt of its own; a picture that is drawn twice is no
    pair with itself.
    """
    there = np.isfinite(said) & np.isfinite(true)
    said, true, groups = said[there], true[there], np.unique(groups[there], return_inverse=True)[1]
    if not len(true):
        return _NONE
    counts = draw_counts(groups.max() + 1, draws, seed)[:, groups]  # (D, N)
    weights = np.concatenate([np.ones((1, len(true))), counts])  # first as they are, then as they are drawn
    right, every = np.zeros(len(weights)), np.zeros(len(weights))
    rows = max(_BLOCK // len(true), 1)
    for start in range(0, len(true), rows):
        mine = slice(start, start + rows)
        better = np.sign(true[mine, None] - true)
        told = (better != 0).astype(np.float64)
        half = (1 + better * np.sign(said[mine, None] - said)) / 2
        right += (weights[:, mine] @ (half * told) * weights).sum(axis=1) / 2  # each pair stands there twice
        every += (weights[:, mine] @ told * weights).sum(axis=1) / 2
    return _share_drawn(right[0], every[0], right[1:], every[1:], int(groups.max()) + 1)


def share_with_fellows(groups: np.ndarray) -> float:
    """Of the pictures of (N,) `groups`, the share that has another one of its prompt; 1 where there is none."""
    counts = np.unique(groups, return_counts=True)[1]
    return float(counts[counts > 1].sum() / counts.sum()) if len(groups) else 1.0


def spread_within(values: np.ndarray, groups: np.ndarray) -> float:
    """Standard deviation of (N,) values around their prompts' means, pooled over prompts of at least two pictures; over
    all pictures if there is no such prompt. NaN does not count."""
    values, groups = values[np.isfinite(values)], np.unique(groups[np.isfinite(values)], return_inverse=True)[1]
    counts = np.bincount(groups)
    if counts.max() < 2:
        return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    off = values - (np.bincount(groups, weights=values) / counts)[groups]
    return float(np.sqrt((off * off).sum() / (counts[counts > 1] - 1).sum()))


def noise_share(plain: np.ndarray, changed: np.ndarray, groups: np.ndarray) -> float | None:
    """How much a change that nobody sees moves a rater, against what it tells pictures of a prompt apart by.

    Root mean square of (N,) `changed` less `plain`, less the part that is common to all pictures, over
    `spread_within(plain)`. At 0.1 the change is a hundredth of the variance; near 1 the rater's order is noise. None
    for a rater who tells nothing apart.
    """
    spread = spread_within(plain, groups)
    return float((changed - plain).std() / spread) if spread > _LEAST else None


def preference(plain: np.ndarray, changed: np.ndarray, groups: np.ndarray, draws: int = 1000, seed: int = 0) -> Figure:
    """How often a rater prefers a picture as it is, `plain` (N,), to the same changed, `changed` (N,); 0.5 is chance.

    A rater who says the same of both is half right. The interval is over prompts. `n`: the number of pictures.
    """
    right = (1 + np.sign(plain - changed)) / 2
    return _share(np.stack([np.bincount(groups, weights=right), np.bincount(groups)], axis=1), draws, seed)


def _share(tallies: np.ndarray, draws: int, seed: int) -> Figure:
    """Of tallies (P, 2), right ones and all of each prompt, the share of the right ones.

    Where all prompts say the same, draws of them do too, and tell nothing of how sure that is: then Wilson's interval,
    of as many answers as there are prompts. No interval of fewer than two prompts.
    """
    right, every = tallies.sum(axis=0)
    drawn_right, drawn = (draw_counts(len(tallies), draws, seed) @ tallies).T
    return _share_drawn(right, every, drawn_right, drawn, int((tallies[:, 1] > 0).sum()))


def _share_drawn(right: float, every: float, drawn_right: np.ndarray, drawn: np.ndarray, prompts: int) -> Figure:
    """`right` of `every`, with the interval of `drawn_right` (D,) of `drawn` (D,); see `_share`."""
    if prompts < 2 or not every:
        return Figure(float(right / every), n=int(every)) if every else _NONE
    there = drawn > 0
    found = figure(float(right / every), drawn_right[there] / drawn[there], int(every))
    return Figure(found.value, *wilson(found.value, prompts), found.n) if found.low == found.high else found


def _mean(values: np.ndarray, counts: np.ndarray) -> Figure:
    there = np.isfinite(values)
    if not there.any():
        return _NONE
    return figure(float(values[there].mean()), mean_draws(values, counts), int(there.sum()))


def _figure(value: float, drawn: np.ndarray, n: int) -> Figure:
    return figure(float(value), drawn[np.isfinite(drawn)], n) if np.isfinite(value) else _NONE
