"""What of a pool is kept: rules on predicted rich feedback. Pure; `finetune.rule_reading` reads them from a YAML.

Shapes: N pictures of the pool, n of them that a rule is asked about, D features.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from finetune.predictions import Predictions
from reward.feedback import HEATMAPS, SCORES

VALUES = (*SCORES, *HEATMAPS, "misaligned_words")
"""What is known of a picture as one number: its scores, its heatmaps' means, its words' mean probability of being
misaligned."""


class EmptySelectionError(ValueError):
    """No picture is left."""


@dataclass(frozen=True)
class Value:
    """A number for each picture: a weighted sum of `VALUES`."""

    weights: Mapping[str, float]

    def __str__(self) -> str:
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights))
        return " + ".join(f"{weight:g} * {name}" for name, weight in self.weights.items())

    def of(self, predictions: Predictions) -> np.ndarray:
        """(N,) float64."""
        return sum(weight * predictions.values[name].astype(np.float64) for name, weight in self.weights.items())


@dataclass(frozen=True)
class MapShare:
    """The share of a heatmap's places that are higher than `above`, for each picture."""

    name: str
    above: float

    def __str__(self) -> str:
        return f"share of {self.name} above {self.above:g}"

    def of(self, predictions: Predictions) -> np.ndarray:
        """(N,) float64."""
        return (predictions.maps[self.name] > self.above * 255).mean(axis=(1, 2))


class Rule(Protocol):
    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        """Which of the pictures `asked` (n,), places in the pool, are kept: (n,) bool."""
        ...


@dataclass(frozen=True)
class Everything:
    """What there is."""

    def __str__(self) -> str:
        return "every picture"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        return np.ones(len(asked), dtype=bool)


@dataclass(frozen=True)
class Threshold:
    """Values in [at_least, at_most]."""

    value: Value | MapShare
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"{self.value} {_bounds(self.at_least, self.at_most)}"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        return _within(self.value.of(predictions)[asked], self.at_least, self.at_most)

    def bounds(self, predictions: Predictions, asked: np.ndarray) -> tuple[float | None, float | None]:
        """The two thresholds, in units of the value."""
        return self.at_least, self.at_most


@dataclass(frozen=True)
class Quantile:
    """Values between two quantiles of what is asked about; with 4 values, `at_least: 0.75` keeps the highest."""

    value: Value
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"{self.value} {_bounds(self.at_least, self.at_most)} in quantiles"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        return _within(self.value.of(predictions)[asked], *self.bounds(predictions, asked))

    def bounds(self, predictions: Predictions, asked: np.ndarray) -> tuple[float | None, float | None]:
        """The two thresholds, in units of the value."""
        values = self.value.of(predictions)[asked]
        return tuple(
            None if edge is None else float(np.quantile(values, edge)) for edge in (self.at_least, self.at_most)
        )


@dataclass(frozen=True)
class BestOf:
    """Of each prompt's pictures the `count` best; of equals the first in the pool."""

    value: Value
    count: int = 1

    def __str__(self) -> str:
        return f"the best{f' {self.count}' if self.count > 1 else ''} of each prompt by {self.value}"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        values, kept = self.value.of(predictions)[asked], np.zeros(len(asked), dtype=bool)
        for places in _by_prompt(predictions, asked):
            best = places[np.argsort(-values[places], kind="stable")[: self.count]]
            kept[best] = True
        return kept


@dataclass(frozen=True)
class FewMisaligned:
    """At most `most` words whose probability of being misaligned is above a threshold (None: the predictor's own)."""

    most: int
    threshold: float | None = None

    def __str__(self) -> str:
        edge = "" if self.threshold is None else f" (probability above {self.threshold:g})"
        return f"at most {self.most} misaligned words{edge}" if self.most else f"no misaligned word{edge}"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        edge = predictions.word_threshold if self.threshold is None else self.threshold
        counts = [int((predictions.misaligned[place] > edge).sum()) for place in asked]
        return np.array(counts) <= self.most


SAME = 1e-3
"""1 - cosine of features as they are, below which two pictures are one.

Of the small world's predictor, what nobody sees (JPEG 95, a shift by a pixel, noise) moves a picture by 0.0001 to
0.0004, nine times in ten by less than 0.001; of 45,000 pairs of pictures the nearest are 0.0007 apart, and all but one
in a thousand more than 0.005 (`tests/tinyworld/test_copies.py` holds it of 200).
"""


@dataclass(frozen=True)
class Distinct:
    """No two kept pictures whose features are nearer than `distance`: from the best by `value` down, one is kept if it
    is that far from all that are kept already.

    The distance is 1 - cosine of the predictor's features, each dimension standardised over the whole pool: 0 for the
    same picture, about 1 for two pictures that have nothing in common. A pool whose pictures are all alike has no such
    scale, so pictures are also too near where the features as they are point the same way, up to `SAME`.
    """

    distance: float
    value: Value
    everywhere: bool = False

    def __str__(self) -> str:
        return (
            f"none nearer than {self.distance:g} to a better one of {'the pool' if self.everywhere else 'its prompt'}"
        )

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        seen = _unit(predictions.features.astype(np.float32))[asked], _directions(predictions.features)[asked]  # (n, D)
        least = SAME, self.distance
        values, kept = self.value.of(predictions)[asked], np.zeros(len(asked), dtype=bool)
        for places in [np.arange(len(asked))] if self.everywhere else _by_prompt(predictions, asked):
            chosen = [np.empty((len(places), features.shape[1]), dtype=features.dtype) for features in seen]
            count = 0
            for place in places[np.argsort(-values[places], kind="stable")]:
                nearest = [
                    1 - (better[:count] @ features[place]).max(initial=-1.0)
                    for better, features in zip(chosen, seen, strict=True)
                ]
                if all(distance >= edge for distance, edge in zip(nearest, least, strict=True)):
                    for better, features in zip(chosen, seen, strict=True):
                        better[count] = features[place]
                    kept[place] = True
                    count += 1
        return kept


@dataclass(frozen=True)
class RandomSome:
    """`count` pictures at random; which, depends on the seed and the pictures' names only."""

    count: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.count} at random"

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        drawn = [hashlib.blake2b(f"{self.seed} {predictions.names[place]}".encode()).digest() for place in asked]
        kept = np.zeros(len(asked), dtype=bool)
        kept[sorted(range(len(asked)), key=drawn.__getitem__)[: self.count]] = True
        return kept


@dataclass(frozen=True)
class Combined:
    """Several rules, each asked about the same pictures; kept is what all of them keep, or any of them."""

    rules: Sequence[Rule]
    every: bool

    def __str__(self) -> str:
        return f" {'and' if self.every else 'or'} ".join(f"({rule})" for rule in self.rules)

    def keep(self, predictions: Predictions, asked: np.ndarray) -> np.ndarray:
        kept = np.stack([rule.keep(predictions, asked) for rule in self.rules])
        return kept.all(axis=0) if self.every else kept.any(axis=0)


@dataclass(frozen=True)
class Step:
    """What one rule did.

    Attributes:
        name: as the YAML calls it.
        asked: (n,) places in the pool, rising.
        kept: those of them that are kept.
    """

    name: str
    rule: Rule
    asked: np.ndarray
    kept: np.ndarray = field(repr=False)

    @property
    def removed(self) -> np.ndarray:
        return np.setdiff1d(self.asked, self.kept, assume_unique=True)


def select(rules: Mapping[str, Rule], predictions: Predictions) -> list[Step]:
    """Go through the rules, each on what the one before it kept.

    Raises:
        EmptySelectionError: nothing is left; the message names the rule that removed the last ones, and how far off
            they were.
    """
    steps: list[Step] = []
    asked = np.arange(len(predictions))
    for name, rule in rules.items():
        kept = asked[rule.keep(predictions, asked)]
        steps.append(Step(name, rule, asked, kept))
        if not len(kept):
            counts = ", ".join(f"{len(step.kept)} behind `{step.name}`" for step in steps[:-1])
            raise EmptySelectionError(
                f"no picture is left: the rule `{name}` ({rule}) removed the last {len(asked)} of {len(predictions)}"
                f"{f' ({counts})' if counts else ''}{_reach(rule, predictions, asked)}; loosen it"
            )
        asked = kept
    return steps


def leaves(rule: Rule) -> Iterable[Rule]:
    """The rules that a rule is made of; itself, if it is not combined."""
    if isinstance(rule, Combined):
        for part in rule.rules:
            yield from leaves(part)
    else:
        yield rule


def asks_for_words(rule: Rule) -> bool:
    """Whether a rule depends on which words the predictor takes for misaligned."""
    return any(
        isinstance(leaf, FewMisaligned) or "misaligned_words" in getattr(getattr(leaf, "value", None), "weights", ())
        for leaf in leaves(rule)
    )


def _reach(rule: Rule, predictions: Predictions, asked: np.ndarray) -> str:
    parts = []
    for leaf in leaves(rule):
        if isinstance(leaf, Threshold | Quantile):
            values = leaf.value.of(predictions)[asked]
            parts.append(f"; among them {leaf.value} reaches from {values.min():.4g} to {values.max():.4g}")
    return "".join(dict.fromkeys(parts))


def _within(values: np.ndarray, at_least: float | None, at_most: float | None) -> np.ndarray:
    kept = np.ones(len(values), dtype=bool)
    if at_least is not None:
        kept &= values >= at_least
    if at_most is not None:
        kept &= values <= at_most
    return kept


def _bounds(at_least: float | None, at_most: float | None) -> str:
    parts = [f"{word} {edge:g}" for word, edge in (("at least", at_least), ("at most", at_most)) if edge is not None]
    return " and ".join(parts)


def _by_prompt(predictions: Predictions, asked: np.ndarray) -> list[np.ndarray]:
    """Places in `asked` of each prompt's pictures, rising."""
    groups = defaultdict(list)
    for index, place in enumerate(asked):
        groups[predictions.prompts[place]].append(index)
    return [np.array(group) for group in groups.values()]


def _directions(features: np.ndarray) -> np.ndarray:
    """Features (N, D), standardised over the pool, as unit vectors."""
    features = features.astype(np.float32)
    return _unit((features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-6)
