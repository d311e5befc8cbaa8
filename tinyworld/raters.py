"""Three people in place of the judge: noisy raters, and how their ratings become one record.

A rater overlooks small flaws, is lenient or strict, hesitates between points of the scale, marks a few points where
something is wrong, and now and then where nothing is. What one says is fixed by seed, picture and rater. How loud the
noise is was chosen by one thing alone: that two trios agree on generated pictures about as well as people do (Spearman
correlation 0.75 to 0.9 on each score). Points are (x, y) in pixels, x right, y down.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from reward.feedback import HEATMAPS, SCORES
from tinyworld.judge import Verdict, overall_of

POINTS = 5  # the scale: 1 .. 5
DISK = 1 / 20  # radius of a mark, in image heights
FRESH = 1000  # raters from this number on have rated nothing that anybody trains on
FEWEST = 64  # fresh raters whose mean is called a ceiling

_LENIENCY = 0.03  # standard deviation over raters, scores in [0, 1]
_MOOD = 0.03  # of a rater's view of one picture, shared by its scores
_HESITATION = {"plausibility": 0.09, "alignment": 0.06, "aesthetics": 0.04, "overall": 0.06}
_SEEN_AREA = 15.0  # pixels: a flaw of this area is overlooked by 37% of the raters
_SEEN_WORD = 0.85  # chance that a belied word is marked
_SLIP = 0.02  # chance that another word is marked
_STRAY = 0.05  # chance of a mark where nothing is wrong, for each map
_POINT_AREA = 40.0  # pixels that one mark stands for
_MOST_POINTS = 6  # marked on one flaw
_JITTER = 1.0  # pixels


@dataclass(frozen=True)
class Rating:
    """What one rater says of one picture.

    Attributes:
        scores: name of `SCORES` -> 1 .. 5, higher is better.
        marks: name of `HEATMAPS` -> (P, 2) float, points (x, y) where something is wrong; P may be 0.
        words: one a word of the caption, 1 = misrepresented or missing.
    """

    scores: Mapping[str, int]
    marks: Mapping[str, np.ndarray]
    words: tuple[int, ...]


@dataclass(frozen=True)
class Consolidated:
    """What several raters say of one picture, together.

    Attributes:
        scores: name of `SCORES` -> mean, rescaled to [0, 1].
        maps: name of `HEATMAPS` -> (H, W) float32 in [0, 1], the share of raters one of whose marks covers the pixel.
        words: (T,) float32 in [0, 1], the share of raters who marked the word.
    """

    scores: Mapping[str, float]
    maps: Mapping[str, np.ndarray]
    words: np.ndarray

    @property
    def labels(self) -> tuple[int, ...]:
        """One a word, 1 = misaligned: what more than half of the raters marked."""
        return tuple(int(share > 0.5) for share in self.words)


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def rate(verdict: Verdict, words: int, uid: str, rater: int, seed: int = 0) -> Rating:
    """What rater number `rater` says of the picture `uid`; the same again for the same key.

    Args:
        words: how many words the caption has.
    """
    rng = _generator(seed, uid, rater)
    leniency = _generator(seed, "leniency", rater).normal(0, _LENIENCY)
    masks = {"implausibility": verdict.implausible, "misalignment": verdict.misaligned}
    marks, shares = {}, {}
    for name in HEATMAPS:
        marks[name], shares[name] = _mark(masks[name], rng)
    belied = rng.random(len(verdict.words)) < _SEEN_WORD
    seen_words = [word for word, seen in zip(verdict.words, belied, strict=True) if seen]
    slips = rng.random(words) < _SLIP
    labels = tuple(
        int(word in seen_words or (bool(slips[word]) and word not in verdict.words)) for word in range(words)
    )

    # A flaw that is overlooked costs nothing. What is missing can be seen in the words only.
    if verdict.words:
        shares["misalignment"] = 0.5 * shares["misalignment"] + 0.5 * len(seen_words) / len(verdict.words)
    plausibility = 1 - (1 - verdict.plausibility) * shares["implausibility"]
    alignment = 1 - (1 - verdict.alignment) * shares["misalignment"]
    felt = {"plausibility": plausibility, "alignment": alignment, "aesthetics": verdict.aesthetics}
    felt["overall"] = overall_of(plausibility, alignment, verdict.aesthetics)
    mood = leniency + rng.normal(0, _MOOD)
    scores = {}
    for name in SCORES:
        value = felt[name] + mood + rng.normal(0, _HESITATION[name])
        scores[name] = int(np.clip(np.rint(1 + (POINTS - 1) * value), 1, POINTS))
    return Rating(scores, marks, labels)


def _mark(mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Marked points (P, 2), and the share of what is wrong that was seen; 1 where nothing is."""
    height, width = mask.shape
    points: list[np.ndarray] = []
    spots, count = ndimage.label(mask, np.ones((3, 3)))
    seen = 0
    for spot in range(1, count + 1):
        places = np.argwhere(spots == spot)
        if rng.random() > 1 - np.exp(-len(places) / _SEEN_AREA):
            continue
        seen += len(places)
        number = int(np.clip(np.rint(len(places) / _POINT_AREA + rng.normal(0, 0.5)), 1, _MOST_POINTS))
        chosen = places[rng.choice(len(places), size=min(number, len(places)), replace=False)]
        points.append(chosen[:, ::-1] + 0.5 + rng.normal(0, _JITTER, (len(chosen), 2)))
    if rng.random() < _STRAY:
        points.append(rng.uniform((0, 0), (width, height), (1, 2)))
    total = int(mask.sum())
    return np.concatenate(points) if points else np.zeros((0, 2)), seen / total if total else 1.0


def disks(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool: pixels whose centre is within `height / 20` of one of the (P, 2) points."""
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    squared = (rows[None, :, None] - points[:, 1, None, None]) ** 2
    squared = squared + (columns[None, None, :] - points[:, 0, None, None]) ** 2
    return (squared <= (DISK * height) ** 2).any(axis=0)


def consolidate(ratings: Sequence[Rating], height: int, width: int | None = None) -> Consolidated:
    """Several raters' ratings of one picture as one record, as in "Rich Human Feedback" (arXiv 2312.10240).

    Scores are averaged and rescaled to [0, 1]. Every mark becomes a disk of radius 1/20 of the height, each rater's
    disks a binary map, and the maps are averaged. Words go by majority (`Consolidated.labels`).

    Args:
        height, width: of the picture, pixels; square by default.

    Raises:
        ValueError: there are no ratings, or they are of captions of different lengths.
    """
    if not ratings:
        raise ValueError("there is no rating to consolidate")
    if len(lengths := {len(rating.words) for rating in ratings}) > 1:
        raise ValueError(f"ratings are of captions of {sorted(lengths)} words; they must be of one picture")
    width = width or height
    scores = {name: (float(np.mean([rating.scores[name] for rating in ratings])) - 1) / (POINTS - 1) for name in SCORES}
    maps = {
        name: np.mean([disks(rating.marks[name], height, width) for rating in ratings], axis=0, dtype=np.float32)
        for name in HEATMAPS
    }
    return Consolidated(scores, maps, np.mean([rating.words for rating in ratings], axis=0, dtype=np.float32))


def ceiling(verdict: Verdict, words: int, uid: str, height: int, raters: int = FEWEST, seed: int = 0) -> Consolidated:
    """The mean of at least 64 fresh raters of one picture: the best that a predictor of ratings could say.

    Raises:
        ValueError: fewer than 64 raters are asked.
    """
    if raters < FEWEST:
        raise ValueError(f"a ceiling is the mean of at least {FEWEST} raters, not of {raters}")
    return consolidate([rate(verdict, words, uid, FRESH + k, seed) for k in range(raters)], height)
