"""The paper's tables: scores, heatmaps, words; what is published, what is predicted, ceiling and baselines, row by row.

Where there is a ceiling, the predictor's share of it has a row as well: each metric's quotient, where higher is better.

Shapes: N pictures, in the order of the split that is judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from reward import published
from reward.feedback import HEATMAPS, SCORES
from reward.intervals import LEVEL, Figure, correlation_draws, draw_counts, figure, mean_draws, word_draws
from reward.metrics import score_metrics, word_metrics

MAP_METRICS = {
    "mse": "MSE all",
    "mse_empty": "MSE GT=0",
    "cc": "CC",
    "kld": "KLD",
    "sim": "SIM",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
}
"""Metric of a heatmap -> its heading in the paper."""

LOWER_IS_BETTER = ("mse", "mse_empty", "kld")


@dataclass(frozen=True)
class Said:
    """What one of those compared (the predictor, fresh raters, a baseline) says of N pictures.

    Attributes:
        scores: (N, 4) in [0, 1], or None where it gives none.
        maps: name of `HEATMAPS` -> metric of `MAP_METRICS` -> (N,), NaN where it is not defined for the picture.
        words: for each picture a label a word, 1 = misaligned; or None.
    """

    maps: Mapping[str, Mapping[str, np.ndarray]]
    scores: np.ndarray | None = None
    words: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Truth:
    """The labels: `scores` (N, 4) in [0, 1]; `words`, for each picture a label a word, 1 = misaligned."""

    scores: np.ndarray
    words: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Row:
    """A row of the tables; it stands in those for which it has figures.

    Attributes:
        kind: "published", "predictor", "ceiling", "of ceiling" or "baseline".
        group: name of the group of pictures; "all" for the whole split, None where figures are published ones.
        scores: name of `SCORES` -> `plcc`, `srcc`.
        heatmaps: name of `HEATMAPS` -> metrics of `MAP_METRICS`.
        words: `precision`, `recall`, `f1`, in [0, 1].
    """

    name: str
    kind: str
    group: str | None = None
    n: int | None = None
    scores: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    heatmaps: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    words: Mapping[str, Figure] = field(default_factory=dict)

    def as_json(self) -> dict:
        """The row as JSON holds it; a figure is `value`, `low`, `high`, `n`, each null where there is none."""
        return asdict(self)


def metric_columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """What `map_metrics` said of each of N pictures -> metric -> (N,), NaN where it said nothing."""
    return {metric: np.array([row.get(metric, np.nan) for row in rows], dtype=np.float64) for metric in MAP_METRICS}


@dataclass(frozen=True)
class Estimate:
    """A metric before it is summed up: its `value`, its (D,) bootstrap `draws`, and the `n` pictures it is about."""

    value: float | None
    draws: np.ndarray
    n: int


@dataclass(frozen=True)
class Estimates:
    """What `Row` holds, as `Estimate`s, of one of those compared over `n` pictures."""

    n: int
    scores: Mapping[str, Mapping[str, Estimate]]
    heatmaps: Mapping[str, Mapping[str, Estimate]]
    words: Mapping[str, Estimate]


def estimates_of(said: Said, truth: Truth, places: Sequence[int], draws: int = 1000) -> Estimates:
    """All metrics of one of those compared, over the pictures `places` of the split.

    Args:
        draws: of the bootstrap (see `reward.intervals`). The same places are drawn alike whoever is judged, so that
            draws of two who are compared belong together.
    """
    places = np.asarray(places)
    count = len(places)
    counts = draw_counts(count, draws)
    scores, words = {}, {}
    if said.scores is not None:
        for index, score in enumerate(SCORES):
            ours, labels = said.scores[places, index], truth.scores[places, index]
            drawn = correlation_draws(ours, labels, draws)
            found = score_metrics(ours, labels)
            scores[score] = {metric: Estimate(value, drawn[metric], count) for metric, value in found.items()}
    if said.words is not None:
        ours, labels = ([side[place] for place in places] for side in (said.words, truth.words))
        tallies = np.array([_tally(*pair) for pair in zip(ours, labels, strict=True)], dtype=np.float64)
        drawn = word_draws(tallies, counts)
        words = {metric: Estimate(value, drawn[metric], count) for metric, value in word_metrics(ours, labels).items()}
    heatmaps = {
        heatmap: {metric: _mean(values[places], counts) for metric, values in columns.items()}
        for heatmap, columns in said.maps.items()
    }
    return Estimates(count, scores, heatmaps, words)


def row_of(estimates: Estimates, name: str, kind: str, group: str = "all") -> Row:
    """The row of one of those compared, with 95% intervals."""

    def sum_up(found: Mapping[str, Estimate]) -> dict[str, Figure]:
        return {metric: figure(one.value, one.draws, one.n) for metric, one in found.items()}

    scores, heatmaps = (
        {part: sum_up(found) for part, found in parts.items()} for parts in (estimates.scores, estimates.heatmaps)
    )
    return Row(name, kind, group, estimates.n, scores, heatmaps, sum_up(estimates.words))


def share_row(predictor: Estimates, ceiling: Estimates, name: str, group: str = "all") -> Row:
    """The predictor's share of the ceiling in each metric where higher is better; 1 = as good as fresh raters.

    Both must be estimates over the same places. The interval is that of the quotient: a draw's pictures are the same
    above and below. A share is None where the ceiling is not above 0; draws in which it is not are left out.
    """

    def share(found: Mapping[str, Estimate], top: Mapping[str, Estimate]) -> dict[str, Figure]:
        both = {metric: (found[metric], top[metric]) for metric in found if metric in top}
        return {metric: _share(*pair) for metric, pair in both.items() if metric not in LOWER_IS_BETTER}

    scores = {score: share(found, ceiling.scores.get(score, {})) for score, found in predictor.scores.items()}
    heatmaps = {part: share(found, ceiling.heatmaps.get(part, {})) for part, found in predictor.heatmaps.items()}
    return Row(name, "of ceiling", group, predictor.n, scores, heatmaps, share(predictor.words, ceiling.words))


def figures_of(
    said: Said, truth: Truth, places: Sequence[int], name: str, kind: str, group: str = "all", draws: int = 1000
) -> Row:
    """`estimates_of` and `row_of` in one; `draws` = 0 gives no intervals."""
    return row_of(estimates_of(said, truth, places, draws), name, kind, group)


def published_rows() -> list[Row]:
    """What others report on RichHF-18K's test split; see `reward.published`."""
    heatmap_rows = [row for of_map in published.HEATMAP_ROWS.values() for row in of_map]
    names = dict.fromkeys([*published.SCORE_ROWS, *heatmap_rows, *published.WORD_ROWS])
    return [
        Row(
            name,
            "published",
            scores={score: _plain(values) for score, values in published.SCORE_ROWS.get(name, {}).items()},
            heatmaps={heatmap: _plain(rows[name]) for heatmap, rows in published.HEATMAP_ROWS.items() if name in rows},
            words=_plain(published.WORD_ROWS.get(name, {})),
        )
        for name in names
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The tables as Markdown: scores, each heatmap, words; in parentheses the ends of 95% intervals."""
    tables = [
        _table(
            ["scores, PLCC / SRCC", "n", *SCORES],
            [[row, *(" / ".join(_pair(row.scores[score])) for score in SCORES)] for row in rows if row.scores],
        )
    ]
    for heatmap in HEATMAPS:
        lines = [
            [
                row,
                *(
                    _cell(row.heatmaps[heatmap].get(metric, Figure(None)), 5 if metric.startswith("mse") else 3)
                    for metric in MAP_METRICS
                ),
            ]
            for row in rows
            if heatmap in row.heatmaps
        ]
        tables.append(_table([f"{heatmap} heatmap", "n", *MAP_METRICS.values()], lines))
    lines = [
        [row, *(_cell(row.words[metric], 1, 100) for metric in ("precision", "recall", "f1"))]
        for row in rows
        if row.words
    ]
    tables.append(_table(["misaligned words, %", "n", "precision", "recall", "F1"], lines))
    return "\n\n".join(tables)


def notes(ceiling: bool, learned: bool = True) -> list[str]:
    """What a reader must know of the tables, a sentence or two a line.

    Args:
        ceiling: whether fresh raters have rows.
        learned: whether those baselines have rows that are learned from training maps.
    """
    told = [
        f"In parentheses: {LEVEL:.0%} bootstrap intervals over pictures.",
        f"Published figures ({published.SOURCE}) are of RichHF-18K's test split and say nothing of other data.",
        "MSE GT=0 is over pictures whose true map is empty, CC to AUC-Judd over the others; '-': there is none.",
    ]
    if learned:
        told.append(
            "'constant' gives every picture one score, one map (the training maps' mean), and calls every word "
            "misaligned."
        )
    else:
        told.append("'constant' gives every picture one score, and calls every word misaligned.")
        told.append(
            "Its map, 'mean map' and 'centre prior' are left out: they are learned from a train split other than what "
            "is evaluated, and there is none."
        )
    if ceiling:
        told.append("'ceiling' is what fresh raters, other than those of the labels, say of the same pictures.")
        told.append("'of ceiling' is the predictor's figure divided by the ceiling's, where higher is better.")
    return told


def _tally(said: Sequence[int], labels: Sequence[int]) -> tuple[int, int, int]:
    return sum(bool(a and b) for a, b in zip(said, labels, strict=True)), sum(map(bool, said)), sum(map(bool, labels))


def _mean(values: np.ndarray, counts: np.ndarray) -> Estimate:
    there = np.isfinite(values)
    return Estimate(float(values[there].mean()) if there.any() else None, mean_draws(values, counts), int(there.sum()))


def _share(found: Estimate, top: Estimate) -> Figure:
    assert found.draws.shape == top.draws.shape, "a share needs both over the same pictures"
    if found.value is None or top.value is None or top.value <= 0:
        return Figure(None, n=found.n)
    above = top.draws > 0
    return figure(found.value / top.value, found.draws[above] / top.draws[above], found.n)


def _plain(values: Mapping[str, float]) -> dict[str, Figure]:
    return {metric: Figure(value) for metric, value in values.items()}


def _pair(found: Mapping[str, Figure]) -> list[str]:
    return [_cell(found.get(metric, Figure(None)), 3) for metric in ("plcc", "srcc")]


def _cell(found: Figure, digits: int, scale: float = 1) -> str:
    if found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({scale * found.low:.{digits}f}, {scale * found.high:.{digits}f})"
    return f"{scale * found.value:.{digits}f}{interval}"


def _table(headings: Sequence[str], lines: Sequence[Sequence]) -> str:
    """Lines of a row and its cells, under headings the second of which is the number of pictures."""
    table = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row, *cells in lines:
        name = " ".join(row.name.split()).replace("|", "\\|")  # a group may be named by a prompt
        table.append("| " + " | ".join([name, "" if row.n is None else str(row.n), *cells]) + " |")
    return "\n".join(table)
