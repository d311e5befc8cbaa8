"""Is it worth choosing what to learn from? Fine-tuning on pictures that the predictor chose, against as many at random.

    python benchmarks/selection_proof.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE]

For each seed a pool is drawn and predicted (`configs/select_tinyworld.yaml`), and the same pipeline is tuned twice,
with the same settings and as many updates (`configs/sft_tinyworld.yaml`): on what the rules chose, and on as many of
the pool's pictures at random. A judge that neither has seen compares them with each other and with the base, on the
same held-out prompts, the last 192, and the same noise. Pairs of tuned and original are counted as the paper counts
them (Liang et al. 2024, section 5.1: its tuned model was preferred in 51.8% of pairs, the original in 16.8%).

To tune the two configs, judge by other prompts than the proof reports, and give settings of `finetune.sft` behind them:

    python benchmarks/selection_proof.py --judged tinyworld/assets/prompts_train.txt --seeds 1 --learning_rate 1e-3

Parts are kept in `--work`, which `uses.py` shares; what is there is not done again, and seeds that are not complete
yet are left out.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import use_parts
from demo_proof import TERMS
from long_runs import Budget, work_folder
from parts import Part, finish, with_needs
from report import Row, flags, publish
from use_parts import (
    BASE,
    HELD_OUT,
    SELECT,
    SFT,
    SFT_ON_SELECTED,
    add_use_flags,
    by_sft,
    drawing,
    selection,
    selection_at_random,
    states_of_code,
)

from finetune.paired import paired_interval
from finetune.sft import SftArguments
from finetune.sft_config import SftConfig
from reward.arguments import parse_arguments
from reward.folder_lock import taken

GOALS = ("satisfied", "overall")
TIE = 0.01  # of the judge's overall: a smaller difference is not seen
KINDS = ("chosen", "random")


def plan(chosen: Part, count: int, options: Namespace) -> dict[str, Part]:
    """What is drawn, with the seed of a selection, by the base and by what was tuned on each kind of data.

    Args:
        count: pictures that were chosen.
    """
    seed, at_random = chosen.seed, selection_at_random(count, chosen, options, options.select)
    drawn = {BASE: drawing(BASE, seed, options, "plain")}
    for kind, name, data in zip(KINDS, (SFT_ON_SELECTED, "SFT on random"), (chosen, at_random), strict=True):
        drawn[kind] = drawing(name, seed, options, "plain", by_sft(name, data, options, options.sft))
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


def rows_of(reports: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The comparisons.

    Args:
        reports: what `finetune.select` says of each seed's selection.
        found: of the base and of each kind, for each seed what `use_drawing.draw` says.
    """
    rows = [Row(f"pictures {what}, mean", float(np.mean([one[name] for one in reports])), n=len(reports))
            for what, name in (("in a pool", "pictures"), ("chosen of it", "kept"))]  # fmt: skip
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
    add_use_flags(parser)
    parser.add_argument("--select", default=SELECT, help=f"config of the selection (default {SELECT})")
    parser.add_argument("--sft", default=SFT, help=f"config of the fine-tuning (default {SFT})")
    parser.add_argument("--judged", default=HELD_OUT, metavar="FILE", help=f"prompts that are judged ({HELD_OUT})")
    return parser


def check_settings(options: Namespace) -> None:
    """Complain about settings of `finetune.sft` that it would refuse, before a pool is drawn."""
    try:
        parse_arguments([SftArguments, SftConfig], ["--config", options.sft, *options.sft_flags])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def main() -> None:
    options, options.sft_flags = make_parser().parse_known_args()
    check_settings(options)
    if options.quick:
        use_parts.make_quick(options, pool=4)
    began = time.perf_counter()
    work, budget = work_folder(options), Budget(options.budget_minutes)
    pools = [selection(seed, options, options.select) for seed in range(options.seeds)]
    failures: list[str] = []
    with taken(work):
        pools = list(finish(pools, work, options.jobs, budget, failures=failures))
        reports = [
            json.loads((pool.folder(work) / "selection" / "selection.json").read_text(encoding="utf-8"))
            for pool in pools
        ]
        plans = [plan(pool, report["kept"], options) for pool, report in zip(pools, reports, strict=True)]
        parts = with_needs([part for one in plans for part in one.values()])
        done = finish(parts, work, options.jobs, budget, failures=failures)
    complete = [number for number, one in enumerate(plans) if all(part in done for part in one.values())]
    if not complete:
        said = [f"no seed is complete yet, {len(done)} of {len(parts)} parts are; run it again, for longer", *failures]
        raise SystemExit("\n".join(said))
    found = {kind: [done[plans[number][kind]] for number in complete] for kind in (BASE, *KINDS)}
    rows = rows_of([reports[number] for number in complete], found)
    rows.append(Row("states of the code among the parts", states_of_code(done)))
    publish(rows, began, options.json, options.quick)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
