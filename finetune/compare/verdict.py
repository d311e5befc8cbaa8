"""Who won, by fixed rules, in words. Pure: tables of numbers in, sentences out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from finetune.compare.measures import FEWEST_SEEDS, LEVEL, MOST_SEEDS, POWER, Difference, difference, holm
from finetune.paired import paired_ratio
from rl.watch_limits import MONITORS

ALPHA = 1 - LEVEL
PRICE = "at a price"
_SMALL = 0.2
"""Of the standard deviation of the base's pictures: what is commonly called a small effect; see `rl.watch_limits`."""

RULES = (
    f"A gain is the mean over held-out prompts and seeds of what an evaluator says of the tuned policy's pictures, "
    f"less what it says of the base's, from the same noise. Its {LEVEL:.0%} interval is Student's, over seeds and "
    f"prompts as crossed random effects; it is of this one figure by itself, so of many one may leave out 0 by chance. "
    f"With fewer than {FEWEST_SEEDS} seeds there is none.",
    f"A difference is shown if its p-value, corrected by Holm's method for all entrants, or all pairs of them, in the "
    f"eyes of one evaluator, is below {ALPHA:.2g}. Differences that the settings asked for by name (`against`) are "
    f"corrected for each other only.",
    "The deciding evaluator is one that no entrant trains on, upper bounds aside; without such a one there is no "
    "verdict. An evaluator is trained on if an entrant's reward is of the same class and reads the same model, "
    "whatever its weights.",
    f"An entrant is gamed if its own reward's gain is above 0 with a p-value, not corrected, below {ALPHA:.2g}, and "
    f"the gain in an evaluator that nobody trains on (where there is none: that it does not train on) is shown to be "
    f"below 0, corrected for the number of these evaluators too, and is below it by more than {_SMALL:g} standard "
    f"deviations of the base's pictures; with fewer than {FEWEST_SEEDS} seeds the means alone say so. A fall that is "
    f"shown and smaller is a price: it is named, and does not keep an entrant from winning.",
    f"An entrant collapses if its pictures hold less than {MONITORS['drawn'].limit:g} of the edges of the base's, or "
    f"differ within a prompt by less than {MONITORS['diversity'].limit:g} of what the base's do.",
    "Entrants that are gamed, collapse, failed or are not finished cannot win, nor can an upper bound.",
    "Of the others, the one of the largest gain leads among those whose gain is shown to be above 0. It wins alone if "
    "it is shown to be ahead of each of the others; those of which that is not shown stand beside it.",
    f"Seeds that are still needed are counted by the variances of seeds, prompts and the rest, for a chance of "
    f"{POWER:.0%} to show the smallest difference that matters, or the one that was seen if none was named; these "
    f"variances are estimates of few seeds, so the number may well be half or twice as large. None are needed where "
    f"the interval leaves out the smallest difference that matters.",
)


@dataclass(frozen=True)
class Flag:
    """What is wrong with an entrant: `kind` is gamed, collapsing, failed, or a price; `text` says what was seen."""

    kind: str
    text: str

    @property
    def rules_out(self) -> bool:
        """Whether the entrant cannot win; a price is only to be known."""
        return self.kind != PRICE


@dataclass(frozen=True)
class Standing:
    """What is known of an entrant.

    Attributes:
        own: gain in its own reward; `own_spread`, the standard deviation of that over the base's pictures.
        gains: evaluator -> gain; `corrected`: evaluator -> its p-value, Holm's over entrants; None where there is none.
        trains_on: the evaluators that it trains on.
        drawn, diversity: at the end, of the base's; diversity None with one picture a prompt.
        kl: mean over seeds; None where it was not measured.
        monitors: of `rl.watch_limits` -> in how many trainings it was across its limit.
        unfinished: why it cannot be judged fully; empty if all is there.
        failed: whether a training failed.
    """

    name: str
    note: str
    upper_bound: bool
    seeds: Sequence[int]
    own: Difference | None
    gains: Mapping[str, Difference]
    corrected: Mapping[str, float | None]
    trains_on: Sequence[str]
    drawn: float | None
    diversity: float | None
    kl: float | None
    monitors: Mapping[str, int]
    unfinished: str = ""
    failed: bool = False
    flags: Sequence[Flag] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether it may win."""
        return not (self.upper_bound or self.unfinished or any(flag.rules_out for flag in self.flags))


@dataclass(frozen=True)
class Pair:
    """`one` less `other`, by the deciding evaluator, on the seeds that both have.

    Attributes:
        corrected: p-value, Holm's over all pairs that were asked for; None with too few seeds.
    """

    one: str
    other: str
    less: Difference
    corrected: float | None

    @property
    def shown(self) -> bool:
        return self.corrected is not None and self.corrected < ALPHA


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        headline: in a line.
        sentences: what it rests on.
        winners: the entrant that leads, and those beside it; empty without a verdict.
    """

    headline: str
    sentences: Sequence[str]
    winners: Sequence[str]


def correct(standings: Sequence[Mapping[str, Difference]]) -> list[dict[str, float | None]]:
    """Of each evaluator's gains, over entrants, the p-values by Holm's method."""
    found: list[dict[str, float | None]] = [dict.fromkeys(gains) for gains in standings]
    for name in {name: None for gains in standings for name in gains}:
        there = [(place, gains[name].p) for place, gains in enumerate(standings)
                 if name in gains and gains[name].p is not None]  # fmt: skip
        for (place, _), p in zip(there, holm([p for _, p in there]), strict=True):
            found[place][name] = p
    return found


def flags_of(standing: Standing, others: Mapping[str, float], own_spread: float) -> list[Flag]:
    """What is wrong with an entrant by the rules.

    Args:
        others: evaluators in whose eyes a fall counts -> standard deviation over the base's pictures; what it trains on
            itself is left out.
        own_spread: that of its own reward.
    """
    flags = []
    if standing.failed:
        flags.append(Flag("failed", standing.unfinished))
    if standing.own is None:
        return flags
    asked = [name for name in others if name not in standing.trains_on]
    fell = [name for name in asked if _fell(standing, name, others[name], len(asked))]
    deeply = [name for name in fell if standing.gains[name].value < -_SMALL * others[name]]
    if standing.own.p is None:
        rose = standing.own.value > _SMALL * own_spread
    else:
        rose = standing.own.value > 0 and standing.own.p < ALPHA
    if rose and fell:
        by = "; ".join(f"{name} {standing.gains[name].value:+.3g}" for name in deeply or fell)
        flags.append(
            Flag("gamed", f"its own reward rose ({standing.own.value:+.3g}) while others fell: {by}")
            if deeply
            else Flag(PRICE, f"its own reward rose ({standing.own.value:+.3g}), others fell a little: {by}")
        )
    seen = []
    if standing.drawn is not None and standing.drawn < MONITORS["drawn"].limit:
        seen.append(f"its pictures hold {standing.drawn:.0%} of the base's edges")
    if standing.diversity is not None and standing.diversity < MONITORS["diversity"].limit:
        seen.append(f"its pictures of a prompt differ by {standing.diversity:.0%} of what the base's do")
    if seen:
        flags.append(Flag("collapsing", "; ".join(seen)))
    return flags


def _fell(standing: Standing, name: str, spread: float, asked: int) -> bool:
    gain, p = standing.gains[name], standing.corrected.get(name)
    return gain.value < -_SMALL * spread if p is None else gain.value < 0 and p * asked < ALPHA


def compare_pairs(
    tables: Mapping[str, Mapping[int, np.ndarray]],
    smallest: float | None,
    asked: Sequence[tuple[str, str]] | None = None,
) -> list[Pair]:
    """Every two entrants.

    Args:
        tables: entrant -> seed -> (P,), gains by the deciding evaluator.
        smallest: as `difference` takes it.
        asked: these pairs only; those without a common seed are left out.
    """
    common = {
        (one, other): seeds
        for one, other in (combinations(tables, 2) if asked is None else asked)
        if (seeds := [seed for seed in tables.get(one, ()) if seed in tables.get(other, ())])
    }
    pairs = []
    for (one, other), seeds in common.items():
        table = np.stack([tables[one][seed] - tables[other][seed] for seed in seeds])
        pairs.append((one, other, difference(table, smallest, tests=len(common))))
    corrected: list[float | None] = [None] * len(pairs)
    there = [place for place, (_, _, less) in enumerate(pairs) if less.p is not None]
    for place, p in zip(there, holm([pairs[place][2].p for place in there]), strict=True):
        corrected[place] = p
    return [Pair(*pair, p) for pair, p in zip(pairs, corrected, strict=True)]


def in_words(pair: Pair) -> str:
    """A sentence about two entrants."""
    less = pair.less
    figure = f"{pair.one} less {pair.other}: {less.value:+.3g}"
    if pair.corrected is None:
        return f"{figure}, {less.seeds} seed{'s' * (less.seeds != 1)}, so no interval."
    figure += f" ({less.low:+.3g} .. {less.high:+.3g}; p {_chances(less.p, pair.corrected)})"
    if pair.shown:
        return f"{figure}: the difference is shown."
    return f"{figure}: no difference can be shown; {needed_in_words(less)}."


def _chances(p: float, corrected: float) -> str:
    """An interval may leave out 0 where many were compared and nothing is shown: then both are said."""
    return f"{corrected:.2g}" if (p < ALPHA) == (corrected < ALPHA) else f"{p:.2g} by itself, {corrected:.2g} corrected"


def needed_in_words(less: Difference) -> str:
    """What would show the difference."""
    if less.smallest is not None and max(abs(less.low), abs(less.high)) < less.smallest:
        return f"none of {less.smallest:g} or more is there, as the interval says"
    if less.more_seeds is None:
        return (
            f"{MOST_SEEDS} seeds would not do with these {less.prompts} prompts: more prompts would, or there is none "
            "that matters"
        )
    size = "one of this size" if less.smallest is None else f"one of {less.smallest:g}"
    if less.more_seeds == 0:
        return f"these seeds would mostly show {size}; a few more would settle it"
    return f"about {less.more_seeds} more seed{'s' * (less.more_seeds != 1)} would be needed to show {size}"


def decide(
    standings: Sequence[Standing],
    pairs: Sequence[Pair],
    by: str | None,
    tables: Mapping[str, Mapping[int, np.ndarray]] | None = None,
) -> Verdict:
    """The verdict by `RULES`.

    Args:
        by: the deciding evaluator, which none of them but an upper bound trains on; None if every evaluator is trained
            on.
        tables: entrant -> seed -> (P,), gains by the deciding evaluator, upper bounds' too; for the share of what an
            upper bound gains.
    """
    about = [_remark(one, flag, by) for one in standings for flag in one.flags]
    about += [f"{one.name} is not finished: {one.unfinished}." for one in standings
              if one.unfinished and not one.failed]  # fmt: skip
    if by is None:
        return Verdict("No verdict: every evaluator is trained on, so none of them is impartial.", about, [])
    sound = sorted(
        (one for one in standings if one.sound and by in one.gains), key=lambda one: one.gains[by].value, reverse=True
    )
    if not sound and not any(one.seeds or one.failed for one in standings):
        return Verdict("No verdict yet: no training is finished.", about, [])
    if not sound:
        return Verdict("None of these: no entrant is finished and neither gamed nor collapsing.", about, [])
    few = min(len(one.seeds) for one in sound)
    if few < FEWEST_SEEDS:
        return Verdict(
            f"No verdict yet: of {few} seed{'s' * (few != 1)} nobody can tell gain from luck; {FEWEST_SEEDS} are the "
            "fewest.",
            [f"By the mean alone, {sound[0].name} is ahead in {by}: {sound[0].gains[by].value:+.3g}.", *about],
            [],
        )
    best = next((one for one in sound if _gains(one, by)), None)
    if best is None:
        gain = sound[0].gains[by]
        missing = [f"Luck may give as much; {needed_in_words(gain)}."] if gain.value > 0 else []
        return Verdict(f"None of these: no gain in {by} is shown.", [_gain(sound[0], by), *missing, *about], [])
    beside, sentences = [], [_gain(best, by)]
    for other in (one for one in sound if one is not best):
        pair = next((pair for pair in pairs if {pair.one, pair.other} == {best.name, other.name}), None)
        if pair is None:
            beside.append(other.name)
            continue
        turned = pair if pair.one == best.name else _turned(pair)
        if not (turned.shown and turned.less.value > 0):
            beside.append(other.name)
        sentences.append(in_words(turned))
    for bound in standings:
        if bound.upper_bound and not bound.flags and _gains(bound, by):
            sentences += _share_in_words(best.name, bound.name, tables or {})
    headline = f"Train on {best.name}."
    if beside:
        headline = f"Train on {best.name}: it leads, but no difference from {_and(beside)} can be shown."
    return Verdict(headline, [*sentences, *about], [best.name, *beside])


def _gains(one: Standing, by: str) -> bool:
    """Whether its gain is shown to be above 0."""
    p = one.corrected.get(by)
    return p is not None and one.gains[by].value > 0 and p < ALPHA


def _share_in_words(best: str, bound: str, tables: Mapping[str, Mapping[int, np.ndarray]]) -> list[str]:
    seeds = [seed for seed in tables.get(best, {}) if seed in tables.get(bound, {})]
    if not seeds:
        return []
    share, low, high = paired_ratio(*([tables[name][seed] for seed in seeds] for name in (best, bound)))
    return [f"That is {share:.2f} ({low:.2f} .. {high:.2f}) of what the upper bound {bound} gains."]


def _gain(one: Standing, by: str) -> str:
    gain = one.gains[by]
    return (
        f"{one.name} gains {gain.value:+.3g} ({gain.low:+.3g} .. {gain.high:+.3g}) in {by} "
        f"(p {one.corrected[by]:.2g}, {gain.seeds} seeds, {gain.prompts} prompts)."
    )


def _remark(one: Standing, flag: Flag, by: str | None) -> str:
    """What is wrong with it, and, as it may lead the table, what it gains."""
    if not flag.rules_out:
        return f"{one.name}, {flag.kind}: {flag.text}."
    gain = one.gains.get(by)
    at_end = "" if gain is None else f" (in {by} {gain.value:+.3g})"
    return f"{one.name} is out: {flag.kind}; {flag.text}{at_end}."


def _turned(pair: Pair) -> Pair:
    less = pair.less
    low, high = (None if end is None else -end for end in (less.high, less.low))
    return Pair(pair.other, pair.one, replace(less, value=-less.value, low=low, high=high), pair.corrected)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
