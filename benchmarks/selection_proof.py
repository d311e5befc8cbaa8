"""Is it worth choosing what to learn from? Fine-tuning on pictures that the predictor chose, against as many at random.

    python benchmarks/selection_proof.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE]

One pool is drawn and predicted (`configs/select_tinyworld.yaml`). For each seed the same pipeline is tuned twice, with
the same settings and as many updates (`configs/sft_tinyworld.yaml`): on what the rules chose, and on as many of the
pool's pictures at random. A judge that neither has seen compares them with each other and with the base, on the same
held-out prompts and noise. Pairs of tuned and original are counted as the paper counts them (Liang et al. 2024, section
5.1: its tuned model was preferred in 51.8% of pairs, the original in 16.8%).

To tune the two configs, judge by other prompts than the proof reports, and give settings of `finetune.sft` behind them:

    python benchmarks/selection_proof.py --judged tinyworld/assets/prompts_train.txt --seeds 1 --learning_rate 1e-3

Parts are kept in `--work`; what is there is not done again, and seeds that are not complete yet are left out.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from demo_proof import TERMS
from long_runs import Budget, add_flags, work_folder
from parts import Part, finish, with_needs
from report import Row, flags, publish
from uses import HELD_OUT, SELECT, SFT, TRAINED_ON, drawing, flags_of, training

from finetune.paired import paired_interval
from finetune.sft import SftArguments
from finetune.sft_config import SftConfig
from reward.arguments import parse_arguments, read_prompt_file
from rl.folder_lock import taken

GOALS = ("satisfied", "overall")
TIE = 0.01  # of the judge's overall: a smaller difference is not seen
BASE, KINDS = "base", ("chosen", "random")


def choose(options: Namespace) -> Part:
    """The pool, and what the config's rules choose from it."""
    place = ["--output_dir", "{folder}/selection", "--pictures", "{folder}/pool/pictures"]
    return training("chosen", 0, ["-m", "finetune.select", "--config", options.select, *place, *options.pool],
                    options.select)  # fmt: skip


def plan(chosen: Part, count: int, seed: int, options: Namespace) -> dict[str, Part]:
    """What is drawn by the base and by what was tuned on each kind of data.

    Args:
        count: pictures that were chosen.
    """
    place = ["--output_dir", "{folder}/selection", "--pictures", "{need}/pool/pictures"]
    rules = ["--rules", json.dumps({"at random": {"random": count, "seed": seed}})]
    at_random = training(
        "random", seed, ["-m", "finetune.select", "--config", options.select, *place, *options.pool, *rules],
        options.select, chosen,
    )  # fmt: skip
    drawn = {BASE: drawing(BASE, seed, options, "plain")}
    for kind, data in zip(KINDS, (chosen, at_random), strict=True):
        flags_ = flags_of(options.sft, seed, ["--data", "{need}/selection/data", *options.run])
        tuned = training(f"SFT on {kind}", seed, ["-m", "finetune.sft", *flags_, "--reward", ""], options.sft, data,
                         draws=False)  # fmt: skip
        drawn[kind] = drawing(f"SFT on {kind}", seed, options, "plain", tuned)
    return drawn


def outcomes(tuned: np.ndarray, original: np.ndarray, tie: float = TIE) -> dict[str, np.ndarray]:
    """Shares of a prompt's pairs (P,) in which the tuned picture is better, the original is, or neither.

    Args:
        tuned, original: (P, G) overall scores of pictures from the same noise.
        tie: differences up to this are none.
    """
    change = tuned - original
    better, worse = (change > tie).mean(axis=1), (change < -tie).mean(axis=1)
    return {"tuned better": better, "original better": worse, "tie": 1 - better - worse}


def rows_of(pool: int, kept: int, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The comparisons.

    Args:
        pool, kept: pictures drawn, and chosen.
        found: of the base and of each kind, for each seed what `use_drawing.draw` says.
    """
    rows = [Row("pictures in the pool", pool), Row("pictures chosen", kept)]
    values = {kind: {term: [np.array(one["values"][term]) for one in runs] for term in TERMS}
              for kind, runs in found.items()}  # fmt: skip
    seeds = len(found[BASE])
    for term in TERMS:
        means = {kind: [one.mean(axis=1) for one in values[kind][term]] for kind in values}
        count = sum(one.size for one in values[BASE][term])
        rows.append(Row(f"{term}, base", float(np.mean(means[BASE])), n=count))
        rows += [Row(f"{term}, tuned on {kind}", float(np.mean(means[kind])), n=count) for kind in KINDS]
        for kind, other in (("chosen", "random"), ("chosen", BASE), ("random", BASE)):
            gains = [one - two for one, two in zip(means[kind], means[other], strict=True)]
            goal = "low > 0" if term in GOALS and other == "random" else None
            rows.append(Row(f"{term}, {kind} - {other}", *paired_interval(gains), n=seeds, goal=goal))
    for kind, other in (("chosen", BASE), ("random", BASE), ("chosen", "random")):
        pairs = [outcomes(*two) for two in zip(values[kind]["overall"], values[other]["overall"], strict=True)]
        names = dict(zip(pairs[0], (f"{kind} better", f"{other} better", "tie"), strict=True))
        for name, said in names.items():
            shares = paired_interval([one[name] for one in pairs])
            rows.append(Row(f"{kind} against {other}: {said}", *shares, n=count))
    spread = {kind: float(np.mean([one["diversity"] for one in runs])) for kind, runs in found.items()}
    rows += [Row(f"diversity, tuned on {kind} / base", spread[kind] / spread[BASE], n=seeds) for kind in KINDS]
    return rows


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0])
    add_flags(parser, "outputs/selection_proof")
    parser.add_argument("--select", default=SELECT, help=f"config of the selection (default {SELECT})")
    parser.add_argument("--sft", default=SFT, help=f"config of the fine-tuning (default {SFT})")
    parser.add_argument("--judged", default=HELD_OUT, metavar="FILE", help=f"prompts that are judged ({HELD_OUT})")
    parser.set_defaults(prompts=256, generations=2, pool=[], run=[])
    return parser


def make_quick(options: Namespace) -> None:
    """As little of everything as there can be."""
    options.seeds, options.jobs, options.prompts = 1, 2, 8
    few = work_folder(options) / "prompts.txt"
    few.parent.mkdir(parents=True, exist_ok=True)
    few.write_text("\n".join(read_prompt_file(TRAINED_ON)[:8]) + "\n")
    options.pool = ["--prompts", str(few.absolute()), "--num_generations", "4"]
    options.run += ["--max_steps", "4", "--per_device_train_batch_size", "8"]


def check_settings(options: Namespace) -> None:
    """Complain about settings of `finetune.sft` that it would refuse, before a pool is drawn."""
    try:
        parse_arguments([SftArguments, SftConfig], ["--config", options.sft, *options.run])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def main() -> None:
    options, options.run = make_parser().parse_known_args()
    check_settings(options)
    if options.quick:
        make_quick(options)
    began = time.perf_counter()
    work, budget = work_folder(options), Budget(options.budget_minutes)
    chosen = choose(options)
    with taken(work):
        if chosen not in finish([chosen], work, 1, budget):
            raise SystemExit("the pool does not fit the budget; run it again, for longer")
        report = json.loads((chosen.folder(work) / "selection" / "selection.json").read_text(encoding="utf-8"))
        plans = [plan(chosen, report["kept"], seed, options) for seed in range(options.seeds)]
        parts = with_needs([part for one in plans for part in one.values()])
        failures: list[str] = []
        done = finish(parts, work, options.jobs, budget, failures=failures)
    complete = [one for one in plans if all(part in done for part in one.values())]
    if not complete:
        said = [f"no seed is complete yet, {len(done)} of {len(parts)} parts are; run it again, for longer", *failures]
        raise SystemExit("\n".join(said))
    found = {kind: [done[one[kind]] for one in complete] for kind in (BASE, *KINDS)}
    rows = rows_of(report["pictures"], report["kept"], found)
    rows.append(Row("states of the code among the parts", len({result.get("code") for result in done.values()})))
    publish(rows, began, options.json, options.quick)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
