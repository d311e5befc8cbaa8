"""Every use of the predictor side by side: what it costs in training and at use, and what a judge says of its pictures.

    python benchmarks/uses.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE] [--page FILE]

Without training: classifier-free guidance (the rival that needs no predictor), the best of N, guidance by the reward's
gradient, mending. Trained: supervised fine-tuning on selected pictures, every variant of back-propagation, DDPO with
three kinds of credit. And two combinations. What needs the predictor is drawn without classifier-free guidance; lines
"at guidance 2" say what it adds to guidance, in a second table whose gains are over guidance alone; "trained at
guidance 2", what it adds if it was trained so too. A seed is one of everything: of each training, and of the noise of
the held-out prompts' pictures, which is the same for all uses. So gains are of pairs, and their intervals over prompts
and seeds.

Every training is its preset's, on the same training prompts, but for what its name says. Settings that were chosen by
the judge, and on what: the `scale` of guidance by the reward, on the first 48 held-out prompts; mending's `min_gain`,
on rendered scenes with planted flaws, whose captions were the first held-out prompts, 67 of them or up to 133, and on
pictures of the rated data set; fine-tuning's settings and the rules of selection, on training prompts. So the last 192
of the 256 held-out prompts are judged: the guiding reward's scale was tuned on none of them, mending on none of the
pictures. On all 256 were seen: that classifier-free guidance gains no more beyond 2 (`demo_proof.py`), and the own
evaluations of runs of DDPO and back-propagation, whose presets were not tuned for this table.

Parts are kept in `--work`, one folder each; what is there is not done again, and uses that are not done yet are left
out of the table. All of the first seed comes first.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import use_parts
from demo_proof import TERMS
from long_runs import Budget, work_folder
from parts import Part, finish, with_needs
from report import Row, flags, publish
from rich.console import Console
from rich.table import Table
from use_parts import (
    BASE,
    BY_DDPO,
    DDPO,
    DRAFT_K,
    GUIDE,
    HELD_TO_REGIONS,
    INPAINT,
    REGION,
    SFT_ON_SELECTED,
    TRAINING,
    VARIANTS,
    add_use_flags,
    at_least_two,
    by_ddpo,
    by_draft,
    by_sft,
    drawing,
    selection,
    states_of_code,
)

from finetune.paired import paired_interval, paired_ratio
from reward.folder_lock import taken

PLACES = ("mask", "focus", "paid", "words")
SCALE = 2.0
"""Of the guidance that needs no predictor: beyond it the generator gains no more (`demo_proof.py`)."""
RIVAL = f"classifier-free guidance {SCALE:g}"
WIDE = 250  # characters of a line of the table


@dataclass(frozen=True)
class Use:
    """One line of the table.

    Attributes:
        draw: the part that draws its pictures; whatever trainings that needs are the use's own.
        rival: the line over which its gains are told too; None: over the base alone.
    """

    name: str
    draw: Part
    rival: str | None = None

    @property
    def trainings(self) -> list[Part]:
        return [part for part in with_needs([self.draw]) if part.script == TRAINING]


def at_guidance(name: str) -> str:
    """What the line of a use is called that draws at the rival's guidance."""
    return f"{name}, at guidance {SCALE:g}"


def trained_at_guidance(name: str) -> str:
    """What the line of a use is called that is trained, and drawn, at the rival's guidance."""
    return f"{name}, trained at guidance {SCALE:g}"


# ---- What is done ----


def uses_of(seed: int, options: Namespace) -> list[Use]:
    """Everything for one seed, cheap things first."""
    found: list[Use] = []

    def use(name: str, by: str, *needs: Part, config: str | None = None, rival: str | None = None, **how: Any) -> Part:
        part = drawing(name, seed, options, by, *needs, config=config, **how)
        found.append(Use(name, part, rival))
        return part

    def beside_rival(name: str, by: str, *needs: Part, **how: Any) -> Part:
        return use(at_guidance(name), by, *needs, rival=RIVAL, guidance=SCALE, **how)

    base = use(BASE, "plain")
    rival = use(RIVAL, "plain", guidance=SCALE)
    best = f"best of {options.best_of}"
    use(best, "best_of", config=DDPO, count=options.best_of)
    use("guided by the reward", "guide", config=GUIDE)
    use("mended", "inpaint", base, config=INPAINT)
    beside_rival(best, "best_of", config=DDPO, count=options.best_of)
    beside_rival("guided by the reward", "guide", config=GUIDE)
    beside_rival("mended", "inpaint", rival, config=INPAINT)

    trainings = {name: by_draft(name, seed, options, *flags_) for name, flags_ in VARIANTS.items()}
    trainings[HELD_TO_REGIONS] = by_draft(HELD_TO_REGIONS, seed, options, config=REGION)
    for credit in ("image", "scalar", options.place):
        name = f"DDPO, credit {credit}"
        trainings[name] = by_ddpo(name, seed, options, credit)
    tuned = trainings[SFT_ON_SELECTED] = by_sft(SFT_ON_SELECTED, selection(seed, options), options)
    name = "SFT on selected, then DDPO"
    trainings[name] = by_ddpo(name, seed, options, after=tuned)

    for name, part in trainings.items():
        use(name, "plain", part)
        if name in (DRAFT_K, BY_DDPO, SFT_ON_SELECTED):
            beside_rival(name, "plain", part)
    name = trained_at_guidance(DRAFT_K)
    part = by_draft(name, seed, options, *VARIANTS[DRAFT_K], "--guidance_scale", f"{SCALE:g}")
    use(name, "plain", part, rival=RIVAL, guidance=SCALE)
    use(f"DRaFT-K, best of {options.best_of}", "best_of", trainings[DRAFT_K], config=DDPO, count=options.best_of)
    if unknown := set(options.only or ()) - {one.name for one in found}:
        raise SystemExit(f"--only: there is no use {unknown.pop()!r}; there are {', '.join(one.name for one in found)}")
    if not options.only:
        return found
    wanted = {BASE, *options.only}
    wanted |= {one.rival for one in found if one.name in wanted}
    return [one for one in found if one.name in wanted]


# ---- What is made of it ----


@dataclass(frozen=True, eq=False)
class Figures:
    """What is known of one use, over its S seeds; a cache's key by itself.

    Attributes:
        seeds: those that are done.
        values: term -> for each seed (P,), means over a prompt's pictures; `diversity` too.
        pictures, seconds: drawn for training, and of the processor in training, all steps to it; means over seeds.
        ms: of the processor, a picture at use; mean over seeds.
        rival: see `Use`; it is done in the same seeds.
    """

    seeds: Sequence[int]
    values: Mapping[str, Sequence[np.ndarray]]
    pictures: float
    seconds: float
    ms: float
    rival: str | None = None


def figures_of(plans: Mapping[int, Sequence[Use]], done: Mapping[Part, Mapping[str, Any]]) -> dict[str, Figures]:
    """Use -> its figures, of the seeds in which it is done, the base too, and its rival; those without any are left
    out."""
    plans = {seed: plan for seed, plan in plans.items() if plan[0].draw in done}
    if not plans:
        return {}
    found = {}
    by_name = {seed: {use.name: use for use in plan} for seed, plan in plans.items()}
    for name, rival in [(use.name, use.rival) for use in next(iter(plans.values()))]:
        uses = {seed: there[name] for seed, there in by_name.items()
                if all(there[one].draw in done for one in (name, rival) if one)}  # fmt: skip
        if not uses:
            continue
        drawn = [done[use.draw] for use in uses.values()]
        spent = [[done[part] for part in use.trainings] for use in uses.values()]
        values = {term: [np.array(one["values"][term]).mean(axis=1) for one in drawn] for term in TERMS}
        values["diversity"] = [np.array(one["diversity"]) for one in drawn]
        found[name] = Figures(
            list(uses), values,
            pictures=float(np.mean([sum(part["pictures"] for part in parts) for parts in spent])),
            seconds=float(np.mean([sum(part["seconds"] for part in parts) for parts in spent])),
            ms=float(np.mean([one["ms"] for one in drawn])),
            rival=rival,
        )  # fmt: skip
    return found


@cache
def gain(one: Figures, base: Figures, term: str) -> tuple[float, float, float]:
    """Over the base, or the rival, on the seeds of `one`, which that has too: mean, low, high."""
    before = dict(zip(base.seeds, base.values[term], strict=True))
    return paired_interval([new - before[seed] for seed, new in zip(one.seeds, one.values[term], strict=True)])


@cache
def kept_diversity(one: Figures, base: Figures) -> tuple[float, float, float]:
    """Of the base's, or the rival's, on the seeds of `one`."""
    before = dict(zip(base.seeds, base.values["diversity"], strict=True))
    return paired_ratio(one.values["diversity"], [before[seed] for seed in one.seeds])


def rows_of(found: Mapping[str, Figures]) -> list[Row]:
    rows = []
    for name, one in found.items():
        count = len(one.seeds)
        rows.append(Row(f"{name}: pictures drawn for training", one.pictures, n=count))
        rows.append(Row(f"{name}: seconds of training", one.seconds, n=count))
        rows.append(Row(f"{name}: ms a picture at use", one.ms, n=count))
        for term in TERMS:
            rows.append(Row(f"{name}: {term}", float(np.mean(one.values[term])), n=count))
            if name != BASE:
                rows.append(Row(f"{name}: {term}, gain", *gain(one, found[BASE], term), n=count))
        rows.append(Row(f"{name}: diversity, of the base's", *kept_diversity(one, found[BASE]), n=count))
        if one.rival:
            rival = found[one.rival]
            rows += [Row(f"{name}: {term}, gain over {one.rival}", *gain(one, rival, term), n=count) for term in TERMS]
            rows.append(Row(f"{name}: diversity, of that of {one.rival}", *kept_diversity(one, rival), n=count))
    return rows


HEADINGS = ("use", "seeds", "pictures drawn for training", "seconds of training", "ms a picture", *TERMS, "diversity")


def tables(found: Mapping[str, Figures]) -> dict[str, list[list[str]]]:
    """Title -> the lines of a table: of all uses, and of those beside the rival."""
    shown = {f"gains over the {BASE}": page(found, BASE)}
    if any(one.rival for one in found.values()):
        beside = {name: one for name, one in found.items() if name == RIVAL or one.rival}
        shown[f"at guidance {SCALE:g}: gains over {RIVAL}"] = page(beside, RIVAL)
    return shown


def page(found: Mapping[str, Figures], other: str) -> list[list[str]]:
    """A line for each use: costs, then for each of `TERMS` the judge's figure and its gain over the `other`, which is
    one of them, and the diversity, of the other's."""
    lines = []
    for name, one in found.items():
        line = [name, str(len(one.seeds)), f"{one.pictures:,.0f}", f"{one.seconds:,.0f}", f"{one.ms:.0f}"]
        for term in TERMS:
            said = f"{np.mean(one.values[term]):.3f}"
            if name != other:
                change, low, high = gain(one, found[other], term)
                said += f", {change:+.3f} ({low:.3f} .. {high:.3f})"
            line.append(said)
        ratio, low, high = kept_diversity(one, found[other])
        lines.append([*line, f"{ratio:.2f}" if name == other else f"{ratio:.2f} ({low:.2f} .. {high:.2f})"])
    return lines


def show(shown: Mapping[str, Sequence[Sequence[str]]], quick: bool) -> None:
    console = Console()
    console.width = max(console.width, WIDE)  # too long a line is better than half a figure
    for title, lines in shown.items():
        table = Table(title=f"{title}; a quick run: these figures prove nothing" if quick else title)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "use" else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(shown: Mapping[str, Sequence[Sequence[str]]]) -> str:
    text = []
    for title, lines in shown.items():
        rows = [HEADINGS, ["---"] * len(HEADINGS), *lines]
        text.append(f"{title[0].upper()}{title[1:]}:\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(text)


# ---- The command ----


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0])
    add_use_flags(parser)
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the tables to this file, as markdown")
    parser.add_argument("--only", nargs="+", metavar="USE", help="these lines of the table, and the base")
    parser.add_argument(
        "--best_of", type=at_least_two, default=4, metavar="N", help="of how many the best is kept (default 4)"
    )
    parser.add_argument("--place", choices=PLACES, default="mask", help="DDPO's place-aware credit (default mask)")
    return parser


def make_quick(options: Namespace) -> None:
    """As little as there can be, and one of each kind only."""
    use_parts.make_quick(options)
    options.best_of = 2
    options.only = options.only or ["best of 2", "guided by the reward", "mended", at_guidance("mended"), DRAFT_K,
                                    at_guidance(DRAFT_K), "DDPO, credit scalar", SFT_ON_SELECTED,
                                    "SFT on selected, then DDPO", "DRaFT-K, best of 2"]  # fmt: skip


def main() -> None:
    options = make_parser().parse_args()
    if options.quick:
        make_quick(options)
    began = time.perf_counter()
    plans = {seed: uses_of(seed, options) for seed in range(options.seeds)}
    parts = with_needs([use.draw for plan in plans.values() for use in plan])
    failures: list[str] = []
    with taken(work_folder(options)):
        done = finish(parts, work_folder(options), options.jobs, Budget(options.budget_minutes), failures=failures)
    found = figures_of(plans, done)
    if BASE not in found:
        said = [f"nothing to show yet: {len(done)} of {len(parts)} parts are done; run it again, for longer", *failures]
        raise SystemExit("\n".join(said))
    shown = tables(found)
    show(shown, options.quick)
    rows = [*rows_of(found), Row("parts done, of those planned", len(done) / len(parts))]
    rows.append(Row("states of the code among them", states_of_code(done)))
    publish(rows, began, options.json, options.quick, shown=False)
    if options.page:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(f"# {__doc__}\n{markdown(shown)}", encoding="utf-8")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
