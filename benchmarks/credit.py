"""Which kind of credit learns most from the same pictures?

    python benchmarks/credit.py [--seeds N] [--jobs N] [--budget_minutes M] [--maps judge] [--quick] [--json FILE]

Every kind of credit (rl/credit.py) gets the same reward, as many pictures and as many updates, two a rollout, so that
the clip range matters. Each is tuned over the same grid of learning rate and clip range, on seeds of their own and by
the judge's score of training prompts. Then the setting chosen is trained anew on the seeds that are reported, and
judged on held-out prompts, whose compositions are in no training data. So nothing reported was selected by itself;
which place-aware kind is "the best" is decided by the tuning as well. Intervals are of pairs, over seeds and prompts.

How many images a kind takes to where `image` ends: its mean curve, made to rise only (`benchmarks/learning.py`).

Trainings are kept in `--work`, each a small file; what is there is not done again, and what is missing is left out of
the table. The order is: tuning seed by seed, then the reported seeds one by one, all kinds of each. `--maps judge`
takes the true judge's maps in place of the predictor's: an experiment about credit alone, which no real project can
make.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from gradient_snr import CREDITS, PICTURES
from learning import NOT_REACHED, mean_curve, resampled, share_needed
from report import Row, flags, publish
from trainings import HELD_OUT, TRAINED_ON, Budget, Result, Training, add_flags, finish, work_folder

from finetune.paired import paired_interval
from reward.feedback import Reward
from reward.rich import RichReward
from rl.watch import Watch
from tinyworld.judge import judge

LEARNING_RATES, CLIPS = (1.5e-3, 3e-3, 6e-3), (5e-5, 1e-2)
"""5e-5 clips about a quarter of the second update's ratios at 3e-3, 1e-2 none."""
LOCATION = 16
"""A place's ratio moves sqrt(h * w) times as far as an image's, so its clip range is as much wider; h = w = 16."""
TUNING_SEEDS = 1000  # and on: none is reported
WITHOUT_PLACE = ("image", "scalar")
STEPS = 2  # that the config trains

Setting = tuple[float, float]
"""Learning rate and clip range."""


class JudgeMaps(RichReward):
    """The predictor's reward, but with the judge's masks in place of its heatmaps, at the same weights."""

    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        said = super().__call__(images, prompts)
        pictures = images.permute(0, 2, 3, 1).float().cpu().numpy()
        verdicts = [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        masks = {
            "implausibility": [verdict.implausible for verdict in verdicts],
            "misalignment": [verdict.misaligned for verdict in verdicts],
        }
        weights = {name: weight for name, weight in self.penalty_weights.items() if weight}
        maps = {name: weight * torch.from_numpy(np.stack(masks[name])).float() for name, weight in weights.items()}
        return Reward(said.total, maps, said.word_penalties, said.terms)


def changes(kind: str, setting: Setting, options: Namespace) -> dict:
    """Settings of run_ddpo.py for one kind of credit."""
    learning_rate, clip = setting
    found = {"credit": "image", **CREDITS[kind], "learning_rate": learning_rate}
    if found["credit"] == "paid":
        found |= {"importance_sampling_level": "location", "epsilon_location": LOCATION * clip}
    else:
        found["epsilon"] = clip
    if options.maps == "judge":
        found["reward"] = "credit:JudgeMaps"
    batch = min(PICTURES, options.pictures)
    return found | {
        "num_train_epochs": options.rollouts,
        "generation_batch_size": options.pictures,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": options.pictures // batch * STEPS // 2,
    }


def grid(options: Namespace) -> list[Setting]:
    return [(rate, clip) for rate in options.learning_rates for clip in options.clips]


def plan_tuning(options: Namespace) -> dict[tuple[str, Setting, int], Training]:
    """(kind, setting, seed) -> training; all kinds of a setting, all settings of a seed. None if there is no choice."""
    if len(grid(options)) == 1:
        return {}
    return {
        (kind, setting, seed): Training(
            f"tuning {kind}, {setting[0]:g}, {setting[1]:g}", seed, changes(kind, setting, options),
            judged=TRAINED_ON, count=options.prompts, every=options.rollouts,
        )
        for seed in range(TUNING_SEEDS, TUNING_SEEDS + options.tuning_seeds)
        for setting in grid(options)
        for kind in options.kinds
    }  # fmt: skip


def choose(options: Namespace, scores: Mapping[tuple[str, Setting, int], float]) -> dict[str, tuple[Setting, float]]:
    """For each kind the setting of the best mean score over tuning seeds, and that score.

    Args:
        scores: of every kind, setting and seed.
    """
    best = {}
    for kind in options.kinds:
        means = {
            setting: float(np.mean([score for (k, s, _), score in scores.items() if (k, s) == (kind, setting)]))
            for setting in grid(options)
        }
        best[kind] = max(means.items(), key=lambda item: item[1])
    return best


def plan_report(options: Namespace, settings: Mapping[str, Setting]) -> dict[tuple[str, int], Training]:
    """(kind, seed) -> training."""
    return {
        (kind, seed): Training(
            kind, seed, changes(kind, settings[kind], options), judged=HELD_OUT, count=options.prompts,
            every=options.rollouts // 6,
        )
        for seed in range(options.seeds)
        for kind in options.kinds
    }  # fmt: skip


# ---- What is made of them ----


def tuning_rows(scores: Mapping[tuple[str, Setting, int], float]) -> list[Row]:
    cells: dict[tuple[str, Setting], list[float]] = {}
    for (kind, setting, _), score in scores.items():
        cells.setdefault((kind, setting), []).append(score)
    return [
        Row(f"tuning, {kind}, learning rate {rate:g}, clip {clip:g}: judge", float(np.mean(found)), n=len(found))
        for (kind, (rate, clip)), found in cells.items()
    ]


def together(found: Mapping[tuple[str, int], Result], kinds: Sequence[str]) -> tuple[list[int], list[np.ndarray]]:
    """The seeds that are there of all `kinds`, and of each kind its judge's curves (S, L, P) of these seeds."""
    seeds = sorted(set.intersection(*({seed for one, seed in found if one == kind} for kind in kinds)))
    return seeds, [np.stack([found[kind, seed].judge for seed in seeds]) if seeds else np.empty(0) for kind in kinds]


def report_rows(found: Mapping[tuple[str, int], Result], kinds: Sequence[str], best: str | None) -> list[Row]:
    """The comparisons that the finished trainings allow.

    Args:
        best: the place-aware kind that the tuning found best; the goals are its.
    """
    rows = []
    for kind in kinds:
        mine = [result for (one, _), result in found.items() if one == kind]
        if not mine:
            continue
        name = f"{kind} (the best by tuning)" if kind == best else kind
        rows.append(Row(f"{name}: judge at the start", float(np.mean([one.judge[0] for one in mine])), n=len(mine)))
        rows.append(Row(f"{name}: judge at the end", float(np.mean([one.judge[-1] for one in mine])), n=len(mine)))
        rows.append(Row(f"{name}: satisfied at the end", float(np.mean([one.satisfied[-1] for one in mine])),
                        n=len(mine)))  # fmt: skip
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
    watch, ever = Watch({}, speaks=False), set()
    for measured in result.watched:
        watch.observe(measured)
        ever |= set(watch.over)
    return sorted(ever)


# ---- The command ----


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0], seeds=5)
    add_flags(parser, "outputs/credit")
    parser.add_argument("--kinds", nargs="+", default=list(CREDITS), choices=list(CREDITS))
    parser.add_argument("--rollouts", type=int, default=18, help="a multiple of 6")
    parser.add_argument("--pictures", type=int, default=256, help="of a rollout")
    parser.add_argument("--prompts", type=int, default=256, help="that the judge looks at")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--clips", type=float, nargs="+", default=list(CLIPS), help="of an image's ratio")
    parser.add_argument("--tuning_seeds", type=int, default=2)
    parser.add_argument("--maps", choices=("predictor", "judge"), default="predictor", help="whose maps are trained on")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.quick:
        options.kinds, options.seeds, options.tuning_seeds, options.jobs = ["image", "scalar", "mask"], 1, 1, 2
        options.rollouts, options.pictures, options.prompts = 6, 16, 16
        options.learning_rates, options.clips = [3e-3, 6e-3], [1e-2]
    if options.rollouts % 6:
        parser.error(f"--rollouts is {options.rollouts}; give a multiple of 6, so that there is a look at 2/3 of them")
    if options.tuning_seeds < 1:
        parser.error(f"--tuning_seeds is {options.tuning_seeds}; to tune nothing, give one learning rate and one clip")
    began = time.perf_counter()
    budget, work = Budget(options.budget_minutes), work_folder(options)

    tuning = plan_tuning(options)
    done = finish(list(tuning.values()), work, options.jobs, budget)
    scores = {key: float(done[one].judge[-1].mean()) for key, one in tuning.items() if one in done}
    rows, share = tuning_rows(scores), len(scores) / max(len(tuning), 1)
    best = None
    if len(scores) == len(tuning):
        settings = {kind: grid(options)[0] for kind in options.kinds}
        if tuning:
            chosen = choose(options, scores)
            settings = {kind: setting for kind, (setting, _) in chosen.items()}
            aware = [kind for kind in options.kinds if kind not in WITHOUT_PLACE]
            best = max(aware, key=lambda kind: chosen[kind][1], default=None)
        for kind, (rate, clip) in settings.items():
            rows += [Row(f"{kind}: learning rate", rate), Row(f"{kind}: clip range", clip)]
        planned = plan_report(options, settings)
        done = finish(list(planned.values()), work, options.jobs, budget)
        found = {key: done[one] for key, one in planned.items() if one in done}
        rows += report_rows(found, options.kinds, best)
        share = (len(scores) + len(found)) / (len(tuning) + len(planned))
    rows.append(Row("trainings, of those planned", share))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
