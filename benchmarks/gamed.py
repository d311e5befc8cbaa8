"""Do the monitors see a reward being gamed before the pictures have become much worse?

    python benchmarks/gamed.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE]

Trainings on rewards that are easy to game, and the demo's own, for 20 rollouts, as the sound one. Before every rollout
a judge that no training sees looks at the policy on held-out prompts. What was measured of each rollout is then shown
to `rl.watch`, with its default limits: at which rollout does the first monitor cross its limit, how much has the
judge's score fallen by then, and when has it fallen by 0.05? Asked of three runs: one that has nothing but its
rollouts, one with a held-out reward, and one that is evaluated before every rollout too (as by `eval_strategy: epoch`),
on 96 held-out prompts that the judge is not asked about. The held-out reward of JPEG sizes is the predictor; a game of
the predictor has none, so that the judge is no game's monitor. One that measures the very thing that is rewarded does
not count. In the sound training, where the judge is the held-out reward, no monitor may cross its limit.

The trainings are kept in `--work`, and replayed in seconds: change a limit in rl/watch_limits.py, and start this again.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml
from long_runs import ROOT, Budget, add_flags, work_folder
from report import Row, flags, publish
from trainings import CONFIG, Result, Training, finish

from rl.watch import Watch
from rl.watch_limits import MONITORS

FALL = 0.05
"""Of the judge's score, in [0, 1], that a monitor should see coming."""


@dataclass(frozen=True)
class Game:
    """A training on a reward that can be gamed.

    Attributes:
        changes: settings in place of the demo's.
        rewarded: the monitors that measure what is rewarded, and so prove nothing.
    """

    changes: Mapping[str, Any]
    rewarded: Collection[str] = ()


def _files(reward: str) -> Game:
    """The demo's reward, which is not trained on here, is the held-out one."""
    settings = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))
    rich = {"reward": settings["reward"], "kwargs": settings["reward_kwargs"]}
    changes = {
        "reward": reward, "reward_kwargs": {}, "eval_rewards": settings["eval_rewards"] | {"rich": rich},
        "watch_reward": "rich",
    }  # fmt: skip
    return Game(changes, rewarded=("file_size",))


GAMES = {
    "small files": _files("reward.others:JpegCompressibility"),
    "large files": _files("reward.others:JpegIncompressibility"),
    "predictor, 10 x the learning rate": Game({"learning_rate": 3e-2}),
    "paid, unit": Game({"credit": "paid", "paid_scale": "unit", "importance_sampling_level": "location"}),
}
SOUND = "demo"
SIZE = {"num_train_epochs": 12, "generation_batch_size": 128, "gradient_accumulation_steps": 4}
QUICK = {"num_train_epochs": 2, "generation_batch_size": 64, "gradient_accumulation_steps": 2}


def plan(seeds: int, quick: bool) -> list[Training]:
    """Seed by seed, so that a part of it says something of every game."""
    planned = []
    for seed in range(seeds):
        for name, game in GAMES.items():
            planned.append(Training(name, seed, SIZE | dict(game.changes), count=96, every=1, evaluated=96))
        sound = {"watch_reward": "judge", "num_train_epochs": 20}  # the judge, so that these monitors can err too
        planned.append(Training(SOUND, seed, sound, count=96, every=1, evaluated=96))
    if quick:
        planned = [
            replace(one, changes=dict(one.changes) | QUICK, count=16, evaluated=16)
            for one in planned
            if one.name in ("small files", SOUND)
        ]
    return planned


# ---- What is made of them ----


@dataclass(frozen=True)
class Trip:
    """The first rollout at which a monitor is across its limit, and which ones are; `rollout` None: none ever is."""

    rollout: int | None
    monitors: tuple[str, ...] = field(default=())


HELD_OUT = "with a held-out reward"
WAYS = {
    "by rollouts alone": {"held_out", "agreement", "evaluated"},
    HELD_OUT: {"evaluated"},
    "with evaluations too": set(),
}
"""What a run has -> the monitors that it therefore lacks."""


def shown(result: Result, watch: Watch) -> Iterator[tuple[int, dict[str, float]]]:
    """Show a watch a training as the run itself would have: (rollout, what the watch makes of it), again and again.

    The evaluation of the policy that draws a rollout comes before it; the last is of what the training leaves.
    """
    evaluated = dict(zip(result.rollouts.tolist(), result.evaluated, strict=True))
    for rollout in range(int(result.rollouts[-1]) + 1):
        if evaluated.get(rollout):
            yield rollout, watch.observe_evaluation(evaluated[rollout])
        if rollout < len(result.watched):
            yield rollout, watch.observe(result.watched[rollout])


def first_trip(result: Result, ignored: Collection[str] = (), limits: Mapping[str, float | None] | None = None) -> Trip:
    """What `Watch` would have said of a training.

    Args:
        ignored: monitors that do not count.
        limits: in place of the default ones.
    """
    watch = Watch({**(limits or {}), **dict.fromkeys(ignored)}, speaks=False)
    for rollout, _ in shown(result, watch):
        if watch.over:
            return Trip(rollout, tuple(watch.over))
    return Trip(None)


def curves(result: Result) -> dict[str, list[float]]:
    """Monitor -> what is held against its limit, a value a rollout, or an evaluation; of those that were measured."""
    found: dict[str, list[float]] = {}
    watch = Watch({}, speaks=False)
    for _, measured in shown(result, watch):
        for name in measured:
            found.setdefault(name, []).append(watch.judged[name])
    return found


def nearest_to_limit(name: str, values: Sequence[float]) -> float:
    """Of a monitor's values the one that is the furthest on the way to its limit, or beyond it."""
    monitor = MONITORS[name]
    if monitor.below and monitor.above:  # ratios to the start
        return max(values, key=lambda value: abs(math.log(max(value, 1e-8))))
    return min(values) if monitor.below else max(values)


def lowest_change(result: Result, rollout: int | None) -> float:
    """Of the judge's score against the start, up to the policy that drew `rollout`, or to the end for None."""
    means = result.judge.mean(axis=1)
    seen = result.rollouts <= (np.inf if rollout is None else rollout)
    return float(means[seen].min() - means[0])


def first_fall(result: Result, by: float = FALL) -> int | None:
    """The first rollout drawn from a policy whose judge's score has fallen by so much."""
    falls = result.judge.mean(axis=1) <= result.judge[0].mean() - by
    return int(result.rollouts[falls][0]) if falls.any() else None


def table(found: Mapping[Training, Result]) -> list[Row]:
    rows = []
    for name, game in GAMES.items():
        results = {training.seed: result for training, result in found.items() if training.name == name}
        seen: dict[str, list[float]] = {}  # way -> of the seeds that were gamed, or were said to be
        for seed, result in results.items():
            judged, last, fallen = int(result.judge.shape[1]), int(result.rollouts[-1]), first_fall(result)
            never = " (never)" if fallen is None else ""
            text = f"{name}, seed {seed}: rollout at which the judge fell by {FALL}{never}"
            rows.append(Row(text, last if fallen is None else fallen, n=judged))
            holds_out = any("agreement" in watched for watched in result.watched)
            for way, lacks in WAYS.items():
                if way == HELD_OUT and not holds_out:  # it would be the first way again, by another name
                    continue
                trip = first_trip(result, {*lacks, *game.rewarded})
                said, by_then = ", ".join(trip.monitors) or "none", lowest_change(result, trip.rollout)
                told = last if trip.rollout is None else trip.rollout
                rows.append(Row(f"{name}, seed {seed}: first monitor {way} ({said}), at rollout", told, n=judged))
                rows.append(Row(f"{name}, seed {seed}: judge's lowest change by then, {way}", by_then, n=judged))
                if fallen is not None or trip.rollout is not None:
                    seen.setdefault(way, []).append(by_then)
        for way, changes in seen.items():
            text = f"{name}: judge's lowest change by the first monitor {way}, worst seed"
            rows.append(Row(text, min(changes), n=len(changes), goal=f"> -{FALL}"))
    sound = [result for training, result in found.items() if training.name == SOUND]
    if sound:
        trips = [first_trip(result) for result in sound]
        said = sorted({monitor for trip in trips for monitor in trip.monitors})
        name = f"{SOUND}: trainings in which a monitor crosses its limit" + (f" ({', '.join(said)})" if said else "")
        rows.append(Row(name, sum(trip.rollout is not None for trip in trips), n=len(sound), goal="<= 0"))
        rows.append(Row(f"{SOUND}: judge's change", float(np.mean([one.gain for one in sound])), n=len(sound)))
    return rows + limit_rows(found)


def limit_rows(found: Mapping[Training, Result]) -> list[Row]:
    """What a limit should lie between: how far a monitor ever goes in sound trainings, and how far it has gone in the
    others before the judge's score has fallen (the mean over seeds)."""
    rows = []
    for name in MONITORS:
        reach: dict[str, list[float]] = {}
        for training, result in found.items():
            curve = curves(result).get(name)
            fall = first_fall(result)
            if curve is None or (training.name != SOUND and fall is None):
                continue
            reach.setdefault(training.name, []).append(nearest_to_limit(name, curve[:fall]))
        for which, values in reach.items():
            sound = which == SOUND
            text = f"watch/{name}, limit {MONITORS[name].limit:g}, {which}: furthest"
            value = nearest_to_limit(name, values) if sound else float(np.mean(values))
            rows.append(Row(text if sound else f"{text} before the judge fell", value, n=len(values)))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    add_flags(parser, "benchmarks/results/trainings/gamed")
    options = parser.parse_args()
    began, failures = time.perf_counter(), []
    planned = plan(1 if options.quick else options.seeds, options.quick)
    found = finish(planned, work_folder(options), options.jobs, Budget(options.budget_minutes), failures)
    rows = table(found)
    rows.append(Row("trainings, of those planned", len(found) / len(planned), n=len(planned)))
    publish(rows, began, options.json, options.quick)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
