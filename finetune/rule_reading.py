"""Rules of selection, as a YAML states them.

    rules:                       # gone through from top to bottom, each on what the one before it kept
      best of its prompt: {best_of: overall}
      good enough: {score: overall, at_least: 0.8}

A rule is one of (VALUE is a name of `VALUES`, or several with weights, `{plausibility: 0.5, implausibility: -4}`):

    {score: VALUE, at_least: A, at_most: B}       a threshold; one of the two may be missing
    {quantile: VALUE, at_least: 0.75}             the same, in quantiles of what the rule is asked about
    {best_of: VALUE, keep: 1}                     of each prompt the best
    {map: MAP, at_most: B, above: T}              a heatmap's mean; with `above`, the share of places higher than T
    {misaligned: 0, threshold: T}                 at most so many misaligned words; T: else the predictor's own
    {distinct: D, by: VALUE, within: prompt}      none nearer than D to a better one (of its prompt; or `within: pool`)
    {random: N, seed: 0}                          N of them
    {any: [RULE, ...]}, {all: [RULE, ...]}        or; and

`rules: {}` keeps everything, as for a training that weighs pictures by their scores instead.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.rules import (
    VALUES,
    BestOf,
    Combined,
    Distinct,
    Everything,
    FewMisaligned,
    MapShare,
    Quantile,
    RandomSome,
    Rule,
    Threshold,
    Value,
)
from reward.feedback import HEATMAPS

_OPTIONS = {
    "score": ("at_least", "at_most"),
    "quantile": ("at_least", "at_most"),
    "best_of": ("keep",),
    "map": ("at_least", "at_most", "above"),
    "misaligned": ("threshold",),
    "distinct": ("by", "within"),
    "random": ("seed",),
    "any": (),
    "all": (),
}


def read_rules(spec: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of a YAML's mapping of names to rules, in its order; of an empty one, one that keeps everything.

    Raises:
        ValueError: not understood; the rule is named, and for an unknown name the nearest one.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(
            "rules: there is none; give a mapping of names to rules, e.g. {best: {best_of: overall}} "
            "(finetune/rule_reading.py lists them), or {} to keep every picture"
        )
    if not spec:
        return {"all": Everything()}
    return {str(name): _read(rule, f"rules: `{name}`") for name, rule in spec.items()}


def _read(spec: Any, where: str) -> Rule:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} is {spec!r}; a rule is a mapping such as {{score: overall, at_least: 0.8}}")
    kinds = [name for name in spec if name in _OPTIONS]
    if len(kinds) != 1:
        unknown = next((str(name) for name in spec if name not in _OPTIONS), None)
        if kinds or unknown is None:
            raise ValueError(f"{where} has {', '.join(kinds) or 'nothing'}; it must have one of {', '.join(_OPTIONS)}")
        raise ValueError(f"{where}: {unknown_name('rule', unknown, _OPTIONS)}")
    kind = kinds[0]
    for name in spec:
        if name != kind and name not in _OPTIONS[kind]:
            raise ValueError(f"{where}: {unknown_name(f'setting of `{kind}`', str(name), _OPTIONS[kind])}")
    what, edges = spec[kind], _edges(spec, where)
    if kind in ("score", "map", "quantile") and edges == (None, None):
        raise ValueError(f"{where} has no threshold; give at_least, at_most, or both")
    if kind == "score":
        return Threshold(read_value(what, where), *edges)
    if kind == "quantile":
        if any(edge is not None and not 0 <= edge <= 1 for edge in edges):
            raise ValueError(f"{where}: quantiles lie in [0, 1]; at_least is {edges[0]}, at_most {edges[1]}")
        return Quantile(read_value(what, where), *edges)
    if kind == "best_of":
        return BestOf(read_value(what, where), _count(spec.get("keep", 1), f"{where}: keep", least=1))
    if kind == "map":
        if what not in HEATMAPS:
            raise ValueError(f"{where}: {unknown_name('map', str(what), HEATMAPS)}")
        for edge in edges:
            _in_range(edge, f"{where}: a threshold of a map")
        above = spec.get("above")
        value = Value({what: 1.0}) if above is None else MapShare(what, _in_range(above, f"{where}: above"))
        return Threshold(value, *edges)
    if kind == "misaligned":
        threshold = spec.get("threshold")
        edge = _in_range(threshold, f"{where}: threshold")
        return FewMisaligned(_count(what, f"{where}: misaligned", least=0), edge)
    if kind == "distinct":
        within = spec.get("within", "prompt")
        if within not in ("prompt", "pool"):
            raise ValueError(f"{where}: within is {within!r}; it must be prompt or pool")
        value = read_value(spec.get("by", "overall"), where)
        return Distinct(_in_range(what, f"{where}: distinct, 1 - the cosine,", most=2), value, within == "pool")
    if kind == "random":
        seed = _count(spec.get("seed", 0), f"{where}: seed", least=0)
        return RandomSome(_count(what, f"{where}: random", least=1), seed)
    if not isinstance(what, Sequence) or isinstance(what, str) or not what:
        raise ValueError(f"{where}: `{kind}` takes a list of rules, not {what!r}")
    rules = [_read(rule, f"{where}, rule {index} of `{kind}`") for index, rule in enumerate(what, start=1)]
    return Combined(rules, every=kind == "all")


def read_value(spec: Any, where: str) -> Value:
    """A name of `VALUES`, or a mapping of such names to weights.

    Raises:
        ValueError: an unknown name (the nearest is given), or a weight that is no number.
    """
    weights = {spec: 1.0} if isinstance(spec, str) else spec
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{where}: {spec!r} is no value; name one of {', '.join(VALUES)}, or several with weights")
    for name in weights:
        if name not in VALUES:
            raise ValueError(f"{where}: {unknown_name('score', str(name), VALUES)}")
    return Value({name: read_number(weight, f"{where}: the weight of {name}") for name, weight in weights.items()})


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """`there is no rule `scor`; nearest: `score`; ...`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    listed = f" (nearest name: `{near[0]}`); there are {', '.join(known)}" if near else "; there is none"
    return f"there is no {what} `{name}`{listed}"


def _edges(spec: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    given = [spec.get(name) for name in ("at_least", "at_most")]
    low, high = (None if edge is None else read_number(edge, f"{where}: a threshold") for edge in given)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{where} keeps nothing: at_least {low:g} is above at_most {high:g}")
    return low, high


def _in_range(value: Any, what: str, most: float = 1) -> float | None:
    """A number in [0, `most`]; None stays None."""
    if value is None:
        return None
    number = read_number(value, what)
    if not 0 <= number <= most:
        raise ValueError(f"{what} is {value!r}; it must lie in [0, {most:g}]")
    return number


def read_number(value: Any, what: str) -> float:
    """What a YAML has where a number must be.

    Raises:
        ValueError: it is none, or not finite.
    """
    try:  # YAML 1.1 reads `1e-3` as a string
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise ValueError(f"{what} is {value!r}; it must be a number")
    return number


def _count(value: Any, what: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}; it must be a whole number of at least {least}")
    return value
