"""A comparison's report: one HTML file that needs no network, the same as Markdown, and all figures as JSON.

`build` makes one mapping of everything that is said, and the three files show it. The page alone has pictures and drawn
curves, whose figures the others have.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from finetune.compare.agreement import agreement_command
from finetune.compare.charts import Bar, Curve, curves_chart, gains_chart
from finetune.compare.config import Comparison
from finetune.compare.entrants import parse_entrant
from finetune.compare.folder import AGREEMENT, training_command
from finetune.compare.measures import FEWEST_SEEDS, band, difference
from finetune.compare.pages import render, signed
from finetune.compare.pictures import picture_rows
from finetune.compare.results import Trained
from finetune.compare.runs import Failure
from finetune.compare.sheet import Counted
from finetune.compare.verdict import (
    RULES,
    Pair,
    Standing,
    Verdict,
    compare_pairs,
    correct,
    decide,
    flags_of,
    in_words,
    needed_in_words,
)
from reward.whole_files import write_whole

NAME = "report"
LARGEST = 10_000_000
"""Bytes of the HTML file that are still sent around without a thought; pictures are left out beyond them."""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        files: what each is -> where.
    """

    verdict: Verdict
    files: Mapping[str, Path]


def write_report(
    comparison: Comparison,
    results: Sequence[Trained],
    disagreement: Failure | None,
    counted: Sequence[Counted] | None,
    command: Sequence[str],
    console: Console,
) -> Report:
    """Write the three files beside the trainings.

    Args:
        disagreement: why agreement before training could not be measured, if it could not.
        command: what makes the report again.
        counted: what people chose, if they were asked.
    """
    content, verdict = build(comparison, results, disagreement, counted, command)
    # Only the page ever leaves pictures out: the other two have none.
    markdown, figures = render("compare.md.jinja", content), _without_pictures(content)
    html = render("compare.html.jinja", content)
    while len(html.encode()) > LARGEST and content["grid"]["rows"]:
        content["grid"]["rows"].pop()
        content["grid"]["left_out"] += 1
        html = render("compare.html.jinja", content)
    if left_out := content["grid"]["left_out"]:
        console.print(f"report.html leaves out the last {left_out} of the prompts, to stay under {LARGEST / 1e6:g} MB")
    files = {"report": f"{NAME}.html", "as Markdown": f"{NAME}.md", "as JSON": f"{NAME}.json"}
    written = {
        f"{NAME}.html": html,
        f"{NAME}.md": markdown,
        f"{NAME}.json": json.dumps(figures, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in written.items():
        write_whole(comparison.folder / name, text.encode())
    return Report(verdict, {what: comparison.folder / name for what, name in files.items()})


def build(
    comparison: Comparison,
    results: Sequence[Trained],
    disagreement: Failure | None,
    counted: Sequence[Counted] | None,
    command: Sequence[str],
) -> tuple[dict[str, Any], Verdict]:
    """Everything that the report says, as JSON can hold it but for pictures and charts, and the verdict."""
    arguments, by = comparison.arguments, comparison.decide_by
    standings = _standings(comparison, results)
    ranked = sorted(standings, key=lambda one: _rank(one, by))
    places = {one.name: place for place, one in enumerate(comparison.entrants)}
    done = {one.entrant.name: one for one in results if one.seeds}
    tables = {one.name: done[one.name].gains(by) for one in ranked if by is not None and one.name in done}
    chosen = {one.name: tables[one.name] for one in ranked if one.name in tables and not one.upper_bound}
    pairs = compare_pairs(chosen, arguments.smallest_difference)
    asked = [(one.name, one.against) for one in comparison.entrants if one.against is not None]
    answers = compare_pairs(tables, arguments.smallest_difference, asked)
    verdict = decide(standings, pairs, by, tables)
    verdict = replace(verdict, sentences=[*verdict.sentences, *(f"Asked: {in_words(pair)}" for pair in answers)])
    judged = [one.name for one in standings if one.sound]
    evaluator = next((one for one in comparison.evaluators if one.name == by), comparison.evaluators[0])
    shown = {one.name: found for one in ranked
             if one.name in done and (found := done[one.name].gains(evaluator.name))}  # fmt: skip
    pictures = picture_rows(comparison, evaluator, shown, judged)
    content = {
        "title": arguments.title,
        "verdict": asdict(verdict),
        "rules": list(RULES),
        "command": shlex.join(command),
        "decide_by": by,
        "few_seeds": len(arguments.seeds) < FEWEST_SEEDS,
        "fewest_seeds": FEWEST_SEEDS,
        "budget": _budget(comparison),
        "wall_hours": sum(facts.wall_seconds for one in results for facts in one.facts) / 3600,
        "codes": sorted({facts.code for one in results for facts in one.facts}),
        "counts": {
            "entrants": len(comparison.entrants), "seeds": list(arguments.seeds), "prompts": len(comparison.held_out),
            "generations": arguments.generations,
        },
        "evaluators": [
            {
                "name": one.name, "reward": one.spec.named[0][1], "term": one.term,
                "trained_on_by": comparison.trained_on_by(one), "impartial": one in comparison.impartial(),
                "bases": _bases(results, one.name),
            }
            for one in comparison.evaluators
        ],
        "entrants": [
            _entrant_row(one, done.get(one.name), by, shlex.join(["python", "-m", *training_command(
                comparison, comparison.entrant(one.name), arguments.seeds[0])]))
            for one in ranked
        ],
        "asked": [_pair_row(pair) for pair in answers],
        "pairs": [_pair_row(pair) for pair in pairs],
        "charts": _charts(comparison, results, ranked, places) if by else [],
        "grid": {
            "by": evaluator.name, "left_out": 0, **asdict(pictures),
        },
        "agreement": _agreement(comparison),
        "agreement_failure": disagreement and asdict(disagreement),
        "people": [asdict(one) for one in counted] if counted else [],
        "failures": [
            {"entrant": one.entrant.name, "seed": seed, **asdict(failure)}
            for one in results
            for seed, failure in one.failures.items()
        ],
    }  # fmt: skip
    return content, verdict


# ---- Parts ----


def _standings(comparison: Comparison, results: Sequence[Trained]) -> list[Standing]:
    smallest = comparison.arguments.smallest_difference
    names = [one.name for one in comparison.evaluators]
    tests = sum(bool(one.seeds) for one in results)
    gains = [
        {
            name: difference(np.stack([*table.values()]), smallest if name == comparison.decide_by else None, tests)
            for name in names
            if (table := one.gains(name) if one.seeds else {})
        }
        for one in results
    ]
    found = []
    for one, gain, corrected in zip(results, gains, correct(gains), strict=True):
        kls = [facts.kl for facts in one.facts if facts.kl is not None]
        crossed = [name for facts in one.facts for name in facts.monitors]
        standing = Standing(
            name=one.entrant.name,
            note=one.entrant.note,
            upper_bound=one.entrant.upper_bound,
            seeds=list(one.seeds),
            own=difference(table[:, -1]) if len(table := _judged(one.own - one.base.own)) else None,
            gains=gain,
            corrected=corrected,
            trains_on=[each.name for each in comparison.evaluators if comparison.trains_on(one.entrant, each)],
            drawn=_share(one.drawn, one.base.drawn) if one.seeds else None,
            diversity=_share(one.diversity, one.base.diversity) if one.seeds and one.diversity is not None else None,
            kl=float(np.mean(kls)) if kls else None,
            monitors={name: crossed.count(name) for name in dict.fromkeys(crossed)},
            unfinished=_unfinished(one),
            failed=bool(one.failures),
        )
        others = {each.name: one.base.spread[each.name] for each in comparison.impartial() or comparison.evaluators}
        flags = flags_of(standing, others, one.base.own_spread)
        found.append(Standing(**{**vars(standing), "flags": flags}))
    return found


def _bases(results: Sequence[Trained], evaluator: str) -> list[dict[str, Any]]:
    """Means before training, of each policy that entrants start from."""
    names: dict[str, list[str]] = {}
    for one in results:
        names.setdefault(one.entrant.base, []).append(one.entrant.name)
    values = {one.entrant.base: float(one.base.columns[evaluator].mean()) for one in results}
    return [{"of": names[base], "value": value} for base, value in values.items()]


def _share(after: np.ndarray, before: np.ndarray) -> float:
    return float(after[:, -1].mean() / before.mean()) if before.mean() > 0 else 1.0


def _unfinished(one: Trained) -> str:
    failed = {failure: [seed for seed, why in one.failures.items() if why == failure]
              for failure in one.failures.values()}  # fmt: skip
    said = [f"{_seeds(seeds)}: {failure.step} failed, {failure.said}" for failure, seeds in failed.items()]
    if one.missing:
        said.append(f"no training yet of {_seeds(one.missing)}")
    return "; ".join(said)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _rank(one: Standing, by: str | None) -> tuple:
    """Those that may win first, then what is wrong with them, upper bounds last; by gain."""
    gain = one.gains[by].value if by in one.gains else float("-inf")
    return one.upper_bound, not one.sound, -gain


def _entrant_row(one: Standing, trained: Trained | None, by: str | None, command: str) -> dict[str, Any]:
    row = {
        "name": one.name, "note": one.note, "upper_bound": one.upper_bound, "sound": one.sound,
        "seeds": list(one.seeds), "own": one.own and asdict(one.own), "trains_on": list(one.trains_on),
        "gains": {name: asdict(gain) | {"corrected": one.corrected[name]} for name, gain in one.gains.items()},
        "drawn": one.drawn, "diversity": one.diversity, "kl": one.kl, "monitors": dict(one.monitors),
        "flags": [asdict(flag) | {"rules_out": flag.rules_out} for flag in one.flags],
        "unfinished": one.unfinished, "command": command,
        "images": None, "seconds": None, "gain_a_thousand_images": None, "gain_a_minute": None,
    }  # fmt: skip
    if trained is not None:
        images, seconds = float(trained.images[:, -1].mean()), float(trained.seconds[:, -1].mean())
        row |= {"images": images, "seconds": seconds}
        if by in one.gains:
            gain = one.gains[by].value
            row |= {"gain_a_thousand_images": 1000 * gain / images, "gain_a_minute": 60 * gain / max(seconds, 1e-9)}
    return row


def _pair_row(pair: Pair) -> dict[str, Any]:
    needed = None if pair.corrected is None or pair.shown else needed_in_words(pair.less)
    return {
        "one": pair.one, "other": pair.other, "less": asdict(pair.less), "corrected": pair.corrected,
        "shown": pair.shown, "needed": needed,
    }  # fmt: skip


def _charts(
    comparison: Comparison, results: Sequence[Trained], ranked: Sequence[Standing], places: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Name, caption, figures and SVG of each."""
    by, done = comparison.decide_by, [one for one in results if one.seeds]
    if not done:
        return []
    bars = [
        Bar(one.name, gain.value, gain.low, gain.high, places[one.name])
        for one in ranked
        if (gain := one.gains.get(by)) is not None
    ]
    said = "; ".join(f"{bar.name} {signed(bar.value)}" for bar in bars)
    found = [{"name": "gains", "caption": f"Gain in {by} at the end, against the policy before training.",
              "bars": [asdict(bar) for bar in bars],
              "svg": gains_chart(bars, f"gain in {by}", f"Gain in {by} of each entrant: {said}.")}]  # fmt: skip
    on_cpu = "of the processor" if _on_cpu(comparison) else "of training"
    for name, x_label, cost in (
        ("images", "pictures drawn in training", lambda one: one.images),
        ("seconds", f"seconds {on_cpu}", lambda one: one.seconds),
    ):
        curves = [
            _curve(one, cost(one), gains, places)
            for one in done
            if len(gains := _judged(one.columns[by] - one.base.columns[by]))
        ]
        alt = f"Learning curves: gain in {by} against {x_label}. At the end: {said}."
        caption = f"Gain in {by} against {x_label}."
        found.append(_curves(f"curve by {name}", caption, curves, x_label, f"gain in {by}", alt))
    curves = [
        _curve(one, one.images, gains / max(one.base.own_spread, 1e-12), places)
        for one in done
        if len(gains := _judged(one.own - one.base.own))
    ]
    ends = "; ".join(f"{curve.name} {signed(curve.mean[-1])}" for curve in curves)
    caption = (
        "Gain of each in its own reward, in standard deviations of it over the base's pictures. Where this rises and "
        f"{by} does not, the reward is gamed."
    )
    alt = f"Learning curves: each entrant's gain in its own reward. At the end: {ends}."
    label = "gain in its own reward, sd"
    found.append(_curves("own reward by images", caption, curves, "pictures drawn in training", label, alt))
    return found


def _curves(name: str, caption: str, curves: Sequence[Curve], x_label: str, y_label: str, alt: str) -> dict[str, Any]:
    """A chart of curves, and its figures: x, mean, low and high of each look, the ends None where there is none."""
    figures = []
    for curve in curves:
        parts = zip(*(part.tolist() for part in (curve.x, curve.mean, curve.low, curve.high)), strict=True)
        looks = [
            {"x": x, "mean": mean, "low": None if np.isnan(low) else low, "high": None if np.isnan(high) else high}
            for x, mean, low, high in parts
        ]
        figures.append({"name": curve.name, "looks": looks})
    svg = curves_chart(curves, x_label, y_label, alt)
    return {"name": name, "caption": caption, "x_label": x_label, "curves": figures, "svg": svg}


def _judged(tables: np.ndarray) -> np.ndarray:
    """(S, L, P) -> those of the S trainings at which the reward did not fail."""
    return tables[np.isfinite(tables).all(axis=(1, 2))]


def _curve(one: Trained, cost: np.ndarray, gains: np.ndarray, places: Mapping[str, int]) -> Curve:
    """From the base on, where nothing has been gained."""
    mean, low, high = (np.concatenate([[0.0], part]) for part in band(gains))
    x = np.concatenate([[0.0], cost.mean(axis=0)])
    return Curve(one.entrant.name, x, mean, low, high, places[one.entrant.name])


def _agreement(comparison: Comparison) -> dict[str, Any] | None:
    file = comparison.folder / AGREEMENT
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    keep = ("raters", "pictures", "prompts", "within", "across", "accuracy", "noise", "defects", "milliseconds")
    rewards = list(found["milliseconds"])
    command = agreement_command(comparison, found["settings"]["rewards"])
    if found["chosen"]:
        found["accuracy"]["people's choices"] = found["chosen"]
    return {name: found[name] for name in keep} | {
        "rewards": rewards, "failed": found.get("failed", {}), "command": shlex.join(["python", "-m", *command]),
        "drawn": "pictures" not in comparison.arguments.agreement,
    }  # fmt: skip


def _budget(comparison: Comparison) -> str:
    if comparison.arguments.budget_images is not None:
        return f"{comparison.arguments.budget_images:,} pictures"
    return f"{comparison.arguments.budget_seconds:g} seconds"


def _on_cpu(comparison: Comparison) -> bool:
    entrant = comparison.entrants[0]
    _, args = parse_entrant(entrant.command, training_command(comparison, entrant, 0)[1:])
    return args.device.type == "cpu"


def _without_pictures(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON is good for."""
    charts = [{name: value for name, value in chart.items() if name != "svg"} for chart in content["charts"]]
    rows = [
        {"prompt": row["prompt"], "shown": [{name: shown[name] for name in ("policy", "value", "change")}
                                            for shown in row["shown"]]}
        for row in content["grid"]["rows"]
    ]  # fmt: skip
    return {**content, "charts": charts, "grid": {**content["grid"], "rows": rows}}
