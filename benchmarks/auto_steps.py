"""Does `train_steps: auto:2` find the steps that are worth training, and what does it save?

    python benchmarks/auto_steps.py [--windows 1:3 ...] [--seeds N] [--jobs N] [--budget_minutes M] [--quick]
                                    [--json FILE]

Three ways to choose the sampling steps that are trained - all of them, some windows, and `auto:2`, which measures by
itself - with the demo's other settings, its learning rate too, as many rollouts, and one update a rollout.
A judge that training never sees looks at the policy on held-out prompts every few rollouts. Time is the processor's, on
one thread, for sampling, decoding, reward and updates, measuring among them.

"To the same score" is to the lower one of the two ends, on mean curves made to rise only (`benchmarks/learning.py`).
Intervals are of pairs, over seeds and prompts. Trainings are kept in `--work`, each a small file; what is there is not
done again, and what is missing is left out of the table.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import numpy as np
from learning import NOT_REACHED, mean_curve, ratio_to_same_level, resampled
from long_runs import Budget, add_flags, work_folder
from report import Row, flags, publish
from trainings import Result, Training, finish

from finetune.paired import paired_interval

AUTO, ALL = "auto:2", "all"
NOISY = 9
"""Of the demo's ten steps; the last one has no noise. A training says so if this is wrong."""


def step_count(steps: str) -> int:
    """How many steps a rollout trains: 2 of `auto:2` and of `1:3`."""
    if steps == ALL:
        return NOISY
    if steps.startswith("auto:"):
        return int(steps.removeprefix("auto:"))
    first, _, end = steps.partition(":")
    return int(end) - int(first)


def plan(options: Namespace) -> dict[tuple[str, int], Training]:
    """(steps, seed) -> training, seed by seed."""
    size = {
        "num_train_epochs": options.rollouts,
        "generation_batch_size": options.pictures,
        "per_device_train_batch_size": options.batch,
    }
    planned = {}
    for seed in range(options.seeds):
        for steps in (AUTO, ALL, *options.windows):
            accumulated = options.pictures // options.batch * step_count(steps)
            changes = size | {"train_steps": steps, "gradient_accumulation_steps": accumulated}
            planned[steps, seed] = Training(f"steps {steps}", seed, changes, count=options.prompts, every=options.every)
    return planned


def together(found: Mapping[tuple[str, int], Result], *ways: str) -> list[list[Result]]:
    """The trainings of each of `ways`, of the seeds that are there of all."""
    seeds = sorted(set.intersection(*({seed for steps, seed in found if steps == way} for way in ways)))
    return [[found[way, seed] for seed in seeds] for way in ways]


def compared(mine: Sequence[Result], others: Sequence[Result]) -> tuple[float, float, float]:
    """Of the judge's score at the end, the difference and its interval."""
    return paired_interval([one.judge[-1] - two.judge[-1] for one, two in zip(mine, others, strict=True)])


def time_to_same_score(mine: Sequence[Result], others: Sequence[Result]) -> tuple[float, float, float]:
    """Seconds that `mine` take over those that `others` take, and its interval; the pairs share seeds and prompts."""
    curves = [np.stack([one.judge for one in results]) for results in (mine, others)]
    seconds = [np.stack([one.seconds for one in results]) for results in (mine, others)]

    def ratio(seeds: np.ndarray, prompts: np.ndarray) -> float:
        means = [mean_curve(one, seeds, prompts) for one in curves]
        axes = [one[seeds].mean(axis=0) for one in seconds]
        return ratio_to_same_level(axes[0], means[0], axes[1], means[1])

    return resampled(ratio, len(mine), curves[0].shape[-1])


def table(found: Mapping[tuple[str, int], Result], windows: Sequence[str]) -> list[Row]:
    rows = []
    for way in (AUTO, ALL, *windows):
        mine = [result for (steps, _), result in found.items() if steps == way]
        if mine:
            pictures = int(mine[0].pictures[-1])
            end = float(np.mean([one.judge[-1] for one in mine]))
            rows.append(Row(f"steps {way}: judge's gain", float(np.mean([one.gain for one in mine])), n=len(mine)))
            rows.append(Row(f"steps {way}: judge after {pictures} pictures", end, n=len(mine)))
            rows.append(Row(f"steps {way}: seconds of it", float(np.mean([one.seconds[-1] for one in mine])),
                            n=len(mine)))  # fmt: skip
    mine, every = together(found, AUTO, ALL)
    if mine:
        name = f"time of {AUTO} to the same score, of {ALL}'s ({NOT_REACHED:g}: not reached)"
        rows.append(Row(name, *time_to_same_score(mine, every), n=len(mine), goal="<= 0.5"))
        rows.append(Row(f"judge at the end, {AUTO} less {ALL}", *compared(mine, every), n=len(mine)))
    ends = {
        window: float(np.mean([one.judge[-1] for (steps, _), one in found.items() if steps == window]))
        for window in windows
        if any(steps == window for steps, _ in found)
    }
    for window, end in ends.items():
        mine, others = together(found, AUTO, window)
        if mine:
            best = end == max(ends.values())
            name = f"judge at the end, {AUTO} less the window {window}" + (" (the best by hand)" if best else "")
            goal = "high >= 0" if best else None
            rows.append(Row(name, *compared(mine, others), n=len(mine), goal=goal))
    return rows


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0])
    add_flags(parser, "benchmarks/results/trainings/auto_steps")
    parser.add_argument("--windows", nargs="+", default=["0:2", "1:3", "2:4"],
                        help="that a hand might find, such as 1:3: steps 1 and 2")  # fmt: skip
    parser.add_argument("--rollouts", type=int, default=18)
    parser.add_argument("--pictures", type=int, default=256, help="of a rollout")
    parser.add_argument("--batch", type=int, default=64, help="pictures of a micro-batch, at most a third of them")
    parser.add_argument("--prompts", type=int, default=256, help="that the judge looks at")
    parser.add_argument("--every", type=int, default=3, help="rollouts from one look to the next")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.quick:
        options.seeds, options.rollouts, options.pictures, options.batch = 1, 4, 24, 8
        options.prompts, options.jobs = 16, 2
    began, failures = time.perf_counter(), []
    planned = plan(options)
    done = finish(list(planned.values()), work_folder(options), options.jobs, Budget(options.budget_minutes), failures)
    found = {key: done[one] for key, one in planned.items() if one in done}
    rows = table(found, options.windows)
    rows.append(Row("trainings, of those planned", len(found) / len(planned), n=len(planned)))
    publish(rows, began, options.json, options.quick)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
