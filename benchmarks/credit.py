"""Which kind of credit learns most from the same pictures?

    python benchmarks/credit.py [--seeds N] [--jobs N] [--budget_minutes M] [--maps judge] [--quick] [--json FILE]

Every kind of credit (rl/credit.py) gets the same reward, as many pictures and as many updates, two a rollout, so that
the clip range matters. Each is tuned over the same grid of learning rate and clip range, on seeds of their own and by
the judge's score of training prompts, in two rounds (successive halving, here by thirds: "Hyperband", Li et al. 2018):
every setting for a third of the rollouts, then the better third of each kind's, anew and in full, of which the best is
taken. Then that setting is trained anew on the seeds that are reported, and judged on held-out prompts, whose
compositions are in no training data. So nothing reported was selected by itself; which place-aware kind is "the best"
is decided by the second round as well. Intervals are of pairs, over seeds and prompts.

How many images a kind takes to where `image` ends: its mean curve, made to rise only (`benchmarks/learning.py`).

Trainings are kept in `--work`, each a small file; what is there is not done again, and what is missing is left out of
the table. The order is: the rounds of the tuning, then the reported seeds one by one, all kinds of each. `--kinds` may
name three that are left out to save time, by what their gradients gain (`benchmarks/gradient_snr.py`): `paid, unit`,
which leads away from the objective, `paid`, which gains less than with its own place alone, and `focus on content`,
which gives as much away as `focus on maps`. `--maps judge` takes the true judge's maps in place of the predictor's: an
experiment about credit alone, which no real project can make.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gradient_snr import CREDITS, PICTURES
from judge_maps import JUDGE_MAPS
from learning import NOT_REACHED, mean_curve, resampled, share_needed
from long_runs import Budget, add_flags, work_folder
from report import Row, flags, publish
from trainings import HELD_OUT, TRAINED_ON, Result, Training, finish

from finetune.paired import paired_interval
from rl.watch import Watch

LEARNING_RATES, CLIPS = (1.5e-3, 3e-3, 6e-3), (5e-5, 1e-2)
"""5e-5 clips about a quarter of the second update's ratios at 3e-3, 1e-2 none."""
LOCATION = 16
"""A place's ratio moves sqrt(h * w) times as far as an image's, so its clip range is as much wider; h = w = 16."""
ROUNDS_GROW = 3
"""The second round is so many times as long as the first, of so many times fewer settings."""
TUNING_SEEDS = 1000  # and on: none is reported; the first is the first round's
MAIN = ("image", "scalar", "focus on maps", "words", "paid, own place", "mask")
WITHOUT_PLACE = ("image", "scalar")
STEPS = 2  # that the config trains

Setting = tuple[float, float]
"""Learning rate and clip range."""


def changes(kind: str, setting: Setting, options: Namespace, rollouts: int) -> dict:
    """Settings of run_ddpo.py for one kind of credit."""
    learning_rate, clip = setting
    found = {"credit": "image", **CREDITS[kind], "learning_rate": learning_rate}
    if found["credit"] == "paid":
        found |= {"importance_sampling_level": "location", "epsilon_location": LOCATION * clip}
    else:
        found["epsilon"] = clip
    if options.maps == "judge" and found["credit"] != "scalar":  # which asks for no map
        found["reward"] = JUDGE_MAPS
    batch = min(PICTURES, options.pictures)
    return found | {
        "num_train_epochs": rollouts,
        "generation_batch_size": options.pictures,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": options.pictures // batch * STEPS // 2,
    }


def grid(options: Namespace) -> list[Setting]:
    return [(rate, clip) for rate in options.learning_rates for clip in options.clips]


def plan_tuning(
    options: Namespace, settings: Mapping[str, Sequence[Setting]], rollouts: int, seeds: Sequence[int]
) -> dict[tuple[str, Setting, int], Training]:
    """One round: (kind, setting, seed) -> training, seed by seed.

    Args:
        settings: of each kind, those that are tried.
        rollouts: of a training; the learning rate is constant, so fewer are the beginning of more.
    """
    return {
        (kind, setting, seed): Training(
            f"tuning {kind}, {setting[0]:g}, {setting[1]:g}", seed, changes(kind, setting, options, rollouts),
            judged=TRAINED_ON, count=options.prompts, every=rollouts,
        )
        for seed in seeds
        for kind in options.kinds
        for setting in settings[kind]
    }  # fmt: skip


def ranking(scores: Mapping[tuple[str, Setting, int], float]) -> dict[str, list[tuple[Setting, float]]]:
    """For each kind its settings and their mean scores over seeds, the best first; equal ones in their order.

    Args:
        scores: of every kind, setting and seed of a round.
    """
    found: dict[str, dict[Setting, list[float]]] = {}
    for (kind, setting, _), score in scores.items():
        found.setdefault(kind, {}).setdefault(setting, []).append(score)
    return {
        kind: sorted(((setting, float(np.mean(values))) for setting, values in cells.items()), key=lambda one: -one[1])
        for kind, cells in found.items()
    }


def better_part(ranked: Mapping[str, Sequence[tuple[Setting, float]]]) -> dict[str, list[Setting]]:
    """Of each kind's settings those that the next round is of, rounded up."""
    return {kind: [setting for setting, _ in order[: -(-len(order) // ROUNDS_GROW)]] for kind, order in ranked.items()}


@dataclass(frozen=True)
class Tuning:
    """What the tuning has found.

    Attributes:
        settings: of each kind the one chosen; None where trainings of it are missing.
        best: the place-aware kind of the best score; None where nothing was compared.
        rows: its scores.
        done: how many trainings are there.
    """

    settings: Mapping[str, Setting] | None
    best: str | None = None
    rows: Sequence[Row] = ()
    done: int = 0


def tune(options: Namespace, train: Callable[[Mapping], Mapping[tuple[str, Setting, int], Result]]) -> Tuning:
    """Both rounds, as far as `train` gets: it gives the results of those trainings that are there."""
    left = dict.fromkeys(options.kinds, grid(options))
    if len(grid(options)) == 1:
        return Tuning({kind: setting for kind, (setting,) in left.items()})
    second = range(TUNING_SEEDS + 1, TUNING_SEEDS + 1 + options.tuning_seeds)
    rows, done = [], 0
    for which, rollouts, seeds in (
        ("first round", options.rollouts // ROUNDS_GROW, [TUNING_SEEDS]),
        ("second round", options.rollouts, second),
    ):
        planned = plan_tuning(options, left, rollouts, seeds)
        scores = {key: float(result.judge[-1].mean()) for key, result in train(planned).items()}
        rows, done = [*rows, *tuning_rows(which, scores)], done + len(scores)
        if len(scores) < len(planned):
            return Tuning(None, rows=rows, done=done)
        ranked = ranking(scores)
        left = better_part(ranked)
    aware = [kind for kind in options.kinds if kind not in WITHOUT_PLACE]
    best = max(aware, key=lambda kind: ranked[kind][0][1], default=None)
    return Tuning({kind: order[0][0] for kind, order in ranked.items()}, best, rows, done)


def count_planned(options: Namespace) -> int:
    """Trainings of the tuning and of the report."""
    settings = len(grid(options))
    tuning = settings + -(-settings // ROUNDS_GROW) * options.tuning_seeds if settings > 1 else 0
    return len(options.kinds) * (tuning + options.seeds)


def plan_report(options: Namespace, settings: Mapping[str, Setting]) -> dict[tuple[str, int], Training]:
    """(kind, seed) -> training."""
    return {
        (kind, seed): Training(
            kind, seed, changes(kind, settings[kind], options, options.rollouts), judged=HELD_OUT,
            count=options.prompts, every=options.rollouts // 6,
        )
        for seed in range(options.seeds)
        for kind in options.kinds
    }  # fmt: skip


# ---- What is made of them ----


def tuning_rows(which: str, scores: Mapping[tuple[str, Setting, int], float]) -> list[Row]:
    return [
        Row(
            f"tuning, {which}, {kind}, learning rate {rate:g}, clip {clip:g}: judge", score,
            n=sum((k, s) == (kind, (rate, clip)) for k, s, _ in scores),
        )
        for kind, order in ranking(scores).items()
        for (rate, clip), score in order
    ]  # fmt: skip


def together(found: Mapping[tuple[str, int], Result], kinds: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """The seeds that are there of all `kinds`, and of each kind its judge's curves (S, L, P) of these seeds."""
    seeds = sorted(set.intersection(*({seed for one, seed in found if one == kind} for kind in kinds)))
    return seeds, [np.stack([found[kind, seed].judge for seed in seeds]) if seeds else np.empty(0) for kind in kinds]


def report_rows(found: Mapping[tuple[str, int], Result], kinds: Sequence[str], best: str | None) -> list[Row]:
    """The comparisons that the finished trainings allow.

    Args:
        best: the place-aware kind that the tuning found best, or that was named beforehand; the goals are its.
    """
    rows = []
    for kind in kinds:
        mine = [result for (one, _), result in found.items() if one == kind]
        if not mine:
            continue
        name = f"{kind} (of which the goals are)" if kind == best else kind
        rows.append(Row(f"{name}: judge at the start", float(np.mean([one.judge[0] for one in mine])), n=len(mine)))
        rows.append(Row(f"{name}: judge at the end", float(np.mean([one.judge[-1] for one in mine])), n=len(mine)))
        rows.append(Row(f"{name}: satisfied at the end", float(np.mean([one.satisfied[-1] for one in mine])),
                        n=len(mine)))  # fmt: skip
        seconds = float(np.mean([one.seconds[-1] for one in mine]))
        rows.append(Row(f"{name}: seconds of the processor, a training", seconds, n=len(mine)))
        tripped = sorted({monitor for one in mine for monitor in over_limits(one)})
        count = sum(bool(over_limits(one)) for one in mine)
        said = f" ({', '.join(tripped)})" if tripped else ""
        rows.append(Row(f"{name}: trainings in which a monitor crosses its limit{said}", count, n=len(mine)))
        for other in WITHOUT_PLACE:
            seeds, curves = together(found, [kind, other]) if other in kinds and other != kind else ([], [])
            if not seeds:
                continue
            goal = "low > 0" if (kind, other) == (best, "scalar") else None
            less = paired_interval([one[-1] - two[-1] for one, two in zip(*curves, strict=True)])
            rows.append(Row(f"{name}: at the end, less {other}'s", *less, n=len(seeds), goal=goal))
        if "image" not in kinds:
            continue
        seeds, curves = together(found, [kind, "image"])
        if kind == "image" or not seeds:
            continue
        pictures = mine[0].pictures
        early = int(np.flatnonzero(pictures * 3 == pictures[-1] * 2)[0])
        less = paired_interval([one[early] - two[-1] for one, two in zip(*curves, strict=True)])
        rows.append(Row(f"{name}: at 2/3 of the images, less image's at the end", *less, n=len(seeds)))

        def share(who: np.ndarray, prompts: np.ndarray, curves=curves, pictures=pictures) -> float:
            mean, other = (mean_curve(one, who, prompts) for one in curves)
            return share_needed(pictures, mean, other)

        interval = resampled(share, len(seeds), curves[0].shape[-1])
        text = f"{name}: share of the images to where image ends ({NOT_REACHED:g}: not reached)"
        rows.append(Row(text, *interval, n=len(seeds), goal="<= 0.667" if kind == best else None))
    return rows


def over_limits(result: Result) -> list[str]:
    """The monitors that crossed their limits anywhere in a training."""
    watch = Watch({}, speaks=False)
    for measured in result.watched:
        watch.observe(measured)
    return watch.crossed


# ---- The command ----


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0], seeds=5)
    add_flags(parser, "benchmarks/results/trainings/credit")
    parser.add_argument("--kinds", nargs="+", default=list(MAIN), choices=list(CREDITS))
    parser.add_argument("--rollouts", type=int, default=12, help="a multiple of 6")
    parser.add_argument("--pictures", type=int, default=256, help="of a rollout")
    parser.add_argument("--prompts", type=int, default=256, help="that the judge looks at")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--clips", type=float, nargs="+", default=list(CLIPS), help="of an image's ratio")
    parser.add_argument("--tuning_seeds", type=int, default=1, help="of the second round")
    parser.add_argument(
        "--best", choices=[kind for kind in CREDITS if kind not in WITHOUT_PLACE],
        help="the place-aware kind of which the goals are (default: the tuning's best, which chance decides as well)",
    )  # fmt: skip
    parser.add_argument("--maps", choices=("predictor", "judge"), default="predictor", help="whose maps are trained on")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.quick:
        options.kinds, options.seeds, options.jobs = ["image", "scalar", "mask"], 1, 2
        options.rollouts, options.pictures, options.prompts = 6, 16, 16
        options.learning_rates, options.clips = [3e-3, 6e-3], [1e-2]
    if options.rollouts % 6:
        parser.error(f"--rollouts is {options.rollouts}; give a multiple of 6, so that there is a look at 2/3 of them")
    if options.best is not None and options.best not in options.kinds:
        parser.error(f"--best is {options.best}, which is not among --kinds: {', '.join(options.kinds)}")
    if options.tuning_seeds < 1:
        parser.error(f"--tuning_seeds is {options.tuning_seeds}; to tune nothing, give one learning rate and one clip")
    began = time.perf_counter()
    budget, work = Budget(options.budget_minutes), work_folder(options)

    def train(planned: Mapping[tuple, Training]) -> dict[tuple, Result]:
        results = finish(list(planned.values()), work, options.jobs, budget)
        return {key: results[one] for key, one in planned.items() if one in results}

    tuned = tune(options, train)
    rows, done = list(tuned.rows), tuned.done
    if tuned.settings is not None:
        for kind, (rate, clip) in tuned.settings.items():
            rows += [Row(f"{kind}: learning rate", rate), Row(f"{kind}: clip range", clip)]
        found = train(plan_report(options, tuned.settings))
        rows += report_rows(found, options.kinds, options.best or tuned.best)
        done += len(found)
    rows.append(Row("trainings, of those planned", done / count_planned(options), n=done))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
