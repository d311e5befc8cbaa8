"""Every use of the predictor side by side: what it costs in training and at use, and what a judge says of its pictures.

    python benchmarks/uses.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE] [--page FILE]

Without training: classifier-free guidance (the rival that needs no predictor), the best of N, guidance by the reward's
gradient, mending. Trained: supervised fine-tuning on selected pictures, every variant of back-propagation, DDPO with
three kinds of credit. And two combinations. Every training is its preset's, on the same training prompts, but for what
its name says: no variant was tuned for this table. A seed is one of everything: of each training, and of the noise of
the held-out prompts' pictures, which is the same for all uses. So gains are of pairs, and their intervals over prompts
and seeds.

Parts are kept in `--work`, one folder each; what is there is not done again, and uses that are not done yet are left
out of the table. All of the first seed comes first.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from demo_proof import TERMS, UNSEEN
from long_runs import Budget, add_flags, work_folder
from parts import Part, finish, with_needs
from report import Row, flags, publish
from rich.console import Console
from rich.table import Table

from finetune.paired import paired_interval, paired_ratio
from reward.arguments import read_prompt_file
from rl.folder_lock import taken

TRAINING, DRAWING = "use_training.py", "use_drawing.py"
POLICY = "tinyworld/assets/sd"
DDPO, DRAFT = "configs/ddpo_tinyworld.yaml", "configs/draft_tinyworld.yaml"
REGION = "configs/draft_tinyworld_region.yaml"
SELECT, SFT, GUIDE, INPAINT = (f"configs/{name}_tinyworld.yaml" for name in ("select", "sft", "guide", "inpaint"))
VARIANTS = {
    "DRaFT": ["--variant", "draft"],
    "DRaFT-K, K = 1": ["--variant", "draft_k"],
    "DRaFT-LV": ["--variant", "draft_lv"],
    "AlignProp": ["--variant", "alignprop"],
    "ReFL": ["--variant", "refl"],
}
PLACES = ("mask", "focus", "paid", "words")
QUIET = ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", *UNSEEN]
HELD_OUT, TRAINED_ON = "tinyworld/assets/prompts_held_out.txt", "tinyworld/assets/prompts_train.txt"
BASE = "base"
WIDE = 240  # characters of a line of the table


@dataclass(frozen=True)
class Use:
    """One line of the table.

    Attributes:
        draw: the part that draws its pictures; whatever trainings that needs are the use's own.
    """

    name: str
    draw: Part

    @property
    def trainings(self) -> list[Part]:
        return [part for part in with_needs([self.draw]) if part.script == TRAINING]


# ---- What is done ----


def training(name: str, seed: int, command: Sequence[object], config: str, *needs: Part, draws: bool = True) -> Part:
    """A training by a command of the toolkit.

    Args:
        command: behind `python`; see `use_training.train`.
        draws: whether it draws pictures itself.
    """
    how = {"command": [*map(str, command)], "draws": draws}
    return Part(name, seed, TRAINING, how, needs, (config, TRAINED_ON))


def drawing(
    name: str, seed: int, options: Namespace, by: str, *needs: Part, config: str | None = None, **how: Any
) -> Part:
    """Pictures, judged.

    Args:
        options: `judged`, a file of prompts, how many of them, and how many pictures of each.
        by: see `use_drawing.draw`.
        needs: the training whose LoRA draws; or the pictures that are to be mended.
        config: of the use.
    """
    told = {"by": by, "policy": POLICY, "prompts": read_prompt_file(options.judged)[: options.prompts],
            "generations": options.generations, "tuned": bool(needs) and needs[0].script == TRAINING, "config": config,
            **how}  # fmt: skip
    return Part(f"pictures of {name}", seed, DRAWING, told, needs, (config,) if config else ())


def uses_of(seed: int, options: Namespace) -> list[Use]:
    """Everything for one seed, cheap things first."""
    found: list[Use] = []

    def use(name: str, by: str, *needs: Part, config: str | None = None, **how: Any) -> Part:
        part = drawing(name, seed, options, by, *needs, config=config, **how)
        found.append(Use(name, part))
        return part

    base = use(BASE, "plain")
    use("classifier-free guidance 2", "plain", guidance=2.0)
    use(f"best of {options.best_of}", "best_of", config=DDPO, count=options.best_of)
    use("guided by the reward", "guide", config=GUIDE)
    use("mended", "inpaint", base, config=INPAINT)

    trainings = {
        name: training(name, seed, ["-m", "finetune.draft", *flags_of(DRAFT, seed, options.draft), *flags_], DRAFT)
        for name, flags_ in VARIANTS.items()
    }
    trainings["DRaFT-K, held to problem regions"] = training(
        "DRaFT region", seed, ["-m", "finetune.draft", *flags_of(REGION, seed, options.draft)], REGION
    )
    for name, credit in {"image": "image", "scalar": "scalar", options.place: options.place}.items():
        command = ["run_ddpo.py", *flags_of(DDPO, seed, options.ddpo), "--credit", credit]
        if credit == "paid":  # which has no ratio of a whole picture
            command += ["--importance_sampling_level", "location"]
        trainings[f"DDPO, credit {name}"] = training(f"DDPO {name}", seed, command, DDPO)
    place = ["--output_dir", "{folder}/selection", "--pictures", "{folder}/pool/pictures"]
    chosen = training(
        "selection", seed, ["-m", "finetune.select", "--config", SELECT, *place, "--seed", seed, *options.select],
        SELECT,
    )  # fmt: skip
    data = ["--data", "{need}/selection/data", *options.sft]
    tuned = training(
        "SFT", seed, ["-m", "finetune.sft", *flags_of(SFT, seed, data), "--reward", ""], SFT, chosen, draws=False
    )
    trainings["SFT on selected"] = tuned
    command = ["run_ddpo.py", *flags_of(DDPO, seed, options.ddpo), "--init_adapter", "{need}/run"]
    trainings["SFT on selected, then DDPO"] = training("SFT, then DDPO", seed, command, DDPO, tuned)

    for name, part in trainings.items():
        use(name, "plain", part)
    use(f"DRaFT-K, best of {options.best_of}", "best_of", trainings["DRaFT-K, K = 1"], config=DDPO,
        count=options.best_of)  # fmt: skip
    if unknown := set(options.only or ()) - {one.name for one in found}:
        raise SystemExit(f"--only: there is no use {unknown.pop()!r}; there are {', '.join(one.name for one in found)}")
    return [one for one in found if not options.only or one.name in (BASE, *options.only)]


def flags_of(config: str, seed: int, more: Iterable[str]) -> list[object]:
    return ["--config", config, "--output_dir", "{folder}/run", "--seed", seed, *QUIET, *more]


# ---- What is made of it ----


@dataclass(frozen=True, eq=False)
class Figures:
    """What is known of one use, over its S seeds; a cache's key by itself.

    Attributes:
        seeds: those that are done.
        values: term -> for each seed (P,), means over a prompt's pictures; `diversity` too.
        pictures, seconds: drawn for training, and of the processor in training, all steps to it; means over seeds.
        ms: of the processor, a picture at use; mean over seeds.
    """

    seeds: Sequence[int]
    values: Mapping[str, Sequence[np.ndarray]]
    pictures: float
    seconds: float
    ms: float


def figures_of(plans: Mapping[int, Sequence[Use]], done: Mapping[Part, Mapping[str, Any]]) -> dict[str, Figures]:
    """Use -> its figures, of the seeds in which it is done, and the base too; those without any are left out."""
    plans = {seed: plan for seed, plan in plans.items() if plan[0].draw in done}
    if not plans:
        return {}
    found = {}
    for name in [use.name for use in next(iter(plans.values()))]:
        uses = {seed: next(use for use in plan if use.name == name) for seed, plan in plans.items()}
        uses = {seed: use for seed, use in uses.items() if use.draw in done}
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
        )  # fmt: skip
    return found


@cache
def gain(one: Figures, base: Figures, term: str) -> tuple[float, float, float]:
    """Over the base, on the seeds of `one`, which the base has too: mean, low, high."""
    before = dict(zip(base.seeds, base.values[term], strict=True))
    return paired_interval([new - before[seed] for seed, new in zip(one.seeds, one.values[term], strict=True)])


@cache
def kept_diversity(one: Figures, base: Figures) -> tuple[float, float, float]:
    """Of the base's, on the seeds of `one`."""
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
    return rows


HEADINGS = ("use", "seeds", "pictures drawn for training", "seconds of training", "ms a picture", *TERMS, "diversity")


def page(found: Mapping[str, Figures]) -> list[list[str]]:
    """A line for each use: costs, then for each of `TERMS` the judge's figure and its gain over the base."""
    lines = []
    for name, one in found.items():
        line = [name, str(len(one.seeds)), f"{one.pictures:,.0f}", f"{one.seconds:,.0f}", f"{one.ms:.0f}"]
        for term in TERMS:
            said = f"{np.mean(one.values[term]):.3f}"
            if name != BASE:
                change, low, high = gain(one, found[BASE], term)
                said += f", {change:+.3f} ({low:.3f} .. {high:.3f})"
            line.append(said)
        lines.append([*line, f"{kept_diversity(one, found[BASE])[0]:.2f}"])
    return lines


def show(lines: Sequence[Sequence[str]], quick: bool) -> None:
    table = Table(title="a quick run: these figures prove nothing" if quick else None)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "use" else "right")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, WIDE)  # too long a line is better than half a figure
    console.print(table)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [HEADINGS, ["---"] * len(HEADINGS), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# ---- The command ----


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0])
    add_flags(parser, "outputs/uses")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the table to this file, as markdown")
    parser.add_argument("--only", nargs="+", metavar="USE", help="these lines of the table, and the base")
    parser.add_argument("--prompts", type=int, default=256, metavar="N", help="held-out prompts (default 256)")
    parser.add_argument("--generations", type=int, default=2, metavar="N", help="pictures of each (default 2)")
    parser.add_argument("--best_of", type=int, default=4, metavar="N", help="of how many the best is kept (default 4)")
    parser.add_argument("--place", choices=PLACES, default="mask", help="DDPO's place-aware credit (default mask)")
    parser.set_defaults(judged=HELD_OUT, ddpo=[], draft=[], select=[], sft=[])
    return parser


def make_quick(options: Namespace) -> None:
    """As little as there can be, and one of each kind only."""
    options.seeds, options.jobs, options.prompts, options.best_of = 1, 2, 6, 2
    options.only = options.only or ["best of 2", "guided by the reward", "mended", "DRaFT-K, K = 1",
                                    "DDPO, credit scalar", "SFT on selected", "SFT on selected, then DDPO",
                                    "DRaFT-K, best of 2"]  # fmt: skip
    few = work_folder(options) / "prompts.txt"
    few.parent.mkdir(parents=True, exist_ok=True)
    few.write_text("\n".join(read_prompt_file(TRAINED_ON)[:4]) + "\n")
    options.ddpo = ["--num_train_epochs", "1", "--generation_batch_size", "16", "--per_device_train_batch_size", "16",
                    "--gradient_accumulation_steps", "2"]  # fmt: skip
    options.draft = ["--num_train_epochs", "1", "--per_device_train_batch_size", "4",
                     "--gradient_accumulation_steps", "1"]  # fmt: skip
    options.select = ["--prompts", str(few.absolute()), "--num_generations", "2", "--rules",
                      '{"best of its prompt": {"best_of": "overall"}}']  # fmt: skip
    options.sft = ["--max_steps", "2", "--per_device_train_batch_size", "4"]


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
    lines = page(found)
    show(lines, options.quick)
    if options.page:
        options.page.write_text(markdown(lines), encoding="utf-8")
    rows = [*rows_of(found), Row("parts done, of those planned", len(done) / len(parts))]
    rows.append(Row("states of the code among them", len({result.get("code") for result in done.values()})))
    publish(rows, began, options.json, options.quick, shown=False)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
