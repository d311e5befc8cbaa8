"""The metrics in which the paper reports (arXiv 2312.10240, section 5.1); pure.

None of them ever returns NaN: where a formula divides by 0 the value is defined below, and an input that is not finite
is an error. Saliency metrics as in Bylinskii et al., arXiv 1604.03605. Shapes: N images (or scores) of H x W pixels.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from scipy.stats import rankdata

EPS = 1e-7
"""Regularisation of KLD, and the spread, of its largest value, below which an array counts as constant."""

ArrayLike = np.ndarray | torch.Tensor | Sequence


def score_metrics(predicted: ArrayLike, true: ArrayLike) -> dict[str, float]:
    """Pearson's and Spearman's correlation of N scores: `plcc`, `srcc`, in [-1, 1], higher is better.

    0 where either side is constant: a predictor that says the same of every image has learned nothing.

    Raises:
        ValueError: shapes that do not fit, or a score that is NaN or infinite.
    """
    predicted, true = _array(predicted), _array(true)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(f"scores must be two arrays (N,), not {predicted.shape} and {true.shape}")
    return {"plcc": _pearson(predicted, true), "srcc": _pearson(rankdata(predicted), rankdata(true))}


def heatmap_metrics(predicted: ArrayLike, true: ArrayLike) -> dict[str, float]:
    """The seven numbers of the paper's heatmap tables, for maps (N, H, W) in [0, 1].

    One image at a time, then averaged: `mse` over all images; `mse_empty` over those whose true map is all 0; and over
    the others `cc`, `sim`, `kld`, `nss`, `auc_judd` (see `map_metrics`). An average over no image is 0.

    Raises:
        ValueError: shapes that do not fit, or a pixel that is NaN or infinite.
    """
    predicted, true = _numpy(predicted), _numpy(true)
    if predicted.shape != true.shape or predicted.ndim != 3:
        raise ValueError(f"heatmaps must be two arrays (N, H, W), not {predicted.shape} and {true.shape}")
    return average_map_metrics([map_metrics(p, t) for p, t in zip(predicted, true, strict=True)])


def average_map_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages of what `map_metrics` gave for each image, as `heatmap_metrics` describes; in chunks, or all at once."""
    names = ("mse", "mse_empty", "cc", "sim", "kld", "nss", "auc_judd")
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float(np.mean(of_images)) if of_images else 0.0 for name, of_images in values.items()}


def map_metrics(predicted: ArrayLike, true: ArrayLike) -> dict[str, float]:
    """Metrics of one image's map P = `predicted` against G = `true`, both (H, W).

    Always `mse`; and `mse_empty` if G is all 0, else
        cc: Pearson's correlation over pixels; 0 if P or G is constant.
        sim: sum min(P', G'), where ' is division by the sum; a P that is all 0 counts as uniform.
        kld: sum G' log(eps + G' / (eps + P')), eps = 1e-7; lower is better.
        nss: mean of (P - mean P) / std P over the pixels where G > 0; 0 if P is constant.
        auc_judd: area under the ROC curve with the pixels where G > 0 as positives, exact: the probability that a
            positive outranks a negative, ties counting half; 0.5 if there is no negative.
    """
    p, g = _array(predicted).ravel(), _array(true).ravel()
    mse = float(np.mean((p - g) ** 2))
    marked = g > 0
    if not marked.any():
        return {"mse": mse, "mse_empty": mse}
    p_share, g_share = _shares(p), _shares(g)
    spread = p.std()
    return {
        "mse": mse,
        "cc": _pearson(p, g),
        "sim": float(np.minimum(p_share, g_share).sum()),
        "kld": float((g_share * np.log(EPS + g_share / (EPS + p_share))).sum()),
        "nss": 0.0 if _is_constant(p) else float((p[marked].mean() - p.mean()) / spread),
        "auc_judd": _auc(p, marked),
    }


def word_metrics(predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> dict[str, float]:
    """`precision`, `recall`, `f1` of "misaligned" (1) over the tokens of all prompts together; 0 where undefined.

    Both are lists of lists of 0 and 1 (or bools), one list a prompt, one label a token.

    Raises:
        ValueError: another number of predictions than of labels, or one of them that is not 0 or 1.
    """
    for index, (p, t) in enumerate(zip(predicted, true, strict=True)):
        if len(p) != len(t):
            raise ValueError(f"prompt {index} has {len(t)} labels but {len(p)} predictions")
    p, t = _marks(predicted, "predictions"), _marks(true, "labels")
    hits = int((p & t).sum())
    precision = hits / int(p.sum()) if p.any() else 0.0
    recall = hits / int(t.sum()) if t.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _marks(rows: Sequence[Sequence[int]], what: str) -> np.ndarray:
    """Labels of each prompt's tokens -> (N,) bool, of all prompts together."""
    values = np.array(list(chain.from_iterable(rows)))
    wrong = (values != 0) & (values != 1)  # NaN too is neither
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {values.size} {what} of words are not 0 or 1, the first is {values[wrong][0]}; "
            "leave out words that do not count, and compare probabilities with a threshold"
        )
    return values == 1


def _numpy(values: ArrayLike) -> np.ndarray:
    return values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _array(values: ArrayLike) -> np.ndarray:
    array = _numpy(values).astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        wrong = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"{wrong} of {array.size} values are NaN or infinite; metrics need finite predictions and truth"
        )
    return array


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if a.size < 2 or _is_constant(a) or _is_constant(b):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), -1, 1))


def _is_constant(values: np.ndarray) -> bool:
    """Whatever their unit."""
    return bool(values.std() <= EPS * np.abs(values).max())


def _shares(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, 1 / values.size)


def _auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Mann and Whitney's statistic, from whole numbers: each positive's place among the sorted negatives.

    Twice the pairs won, ties counting once, is the number of negatives below a positive plus that of those not above.
    """
    positives, negatives = np.sort(values[positive]), np.sort(values[~positive])  # sorted positives: faster to look up
    if not negatives.size:
        return 0.5
    below, not_above = (int(np.searchsorted(negatives, positives, side).sum()) for side in ("left", "right"))
    return (below + not_above) / (2 * positives.size * negatives.size)
