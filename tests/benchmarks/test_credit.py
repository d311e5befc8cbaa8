"""What is tuned on what, and which trainings are compared with which."""

from dataclasses import replace

import numpy as np
import pytest
from credit import (
    MAIN,
    STEPS,
    better_part,
    count_planned,
    grid,
    make_parser,
    plan_report,
    plan_tuning,
    ranking,
    report_rows,
    together,
    tune,
)
from gradient_snr import CREDITS
from judge_maps import JUDGE_MAPS
from trainings import HELD_OUT, TRAINED_ON, Result

from reward.arguments import parse_arguments
from rl.ddpo import DDPOConfig
from run_ddpo import RunArguments

LOOKS, PROMPTS = 7, 12


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("learning.DRAWS", 100)


def training_of(slope, seed, end=0.6):
    """It rises by `slope` of the way to `end` a look, the same noise over prompts for a seed."""
    noise = np.random.default_rng(seed).normal(0, 0.01, PROMPTS)
    curve = np.minimum(0.5 + slope * (end - 0.5) * np.arange(LOOKS) / (LOOKS - 1), 0.9)
    judged = curve[:, None] + noise
    return Result(3 * np.arange(LOOKS), 768 * np.arange(LOOKS), np.zeros(LOOKS), judge=judged, satisfied=judged > 0.5,
                  reward=np.zeros(LOOKS), evaluated=[], watched=[], wall=1.0)  # fmt: skip


def test_settings_are_the_commands_own(tmp_path):
    """Every kind's settings are taken by the command line, with two updates a rollout, and no kind ignores its clip."""
    options = make_parser().parse_args(["--pictures", "128", "--kinds", *CREDITS])
    for kind in CREDITS:
        planned = plan_report(options, dict.fromkeys(CREDITS, (6e-3, 1e-4)))[kind, 0]
        run, args = parse_arguments([RunArguments, DDPOConfig], planned.argv(str(tmp_path)))
        assert args.plan(STEPS).updates == 2
        assert args.learning_rate == 6e-3
        level = args.importance_sampling_level
        assert level == ("location" if kind.startswith("paid") else "image")
        assert {"image": args.epsilon, "location": args.epsilon_location / 16}[level] == pytest.approx(1e-4)
        assert run.reward == "reward.rich:RichReward"


def test_whose_maps_they_are_is_nothing_to_a_kind_that_asks_for_none():
    """So its trainings serve both tables."""
    settings = dict.fromkeys(CREDITS, (6e-3, 1e-4))
    plans = [plan_report(make_parser().parse_args(["--maps", whose]), settings) for whose in ("predictor", "judge")]
    assert plans[0]["scalar", 0].file == plans[1]["scalar", 0].file
    assert plans[1]["image", 0].changes["reward"] == JUDGE_MAPS


def test_tuning_shares_neither_seeds_nor_prompts_with_the_report():
    options = make_parser().parse_args([])
    everything = dict.fromkeys(MAIN, grid(options))
    first, second = plan_tuning(options, everything, 6, [1000]), plan_tuning(options, everything, 18, [1001])
    report = plan_report(options, dict.fromkeys(MAIN, (3e-3, 1e-2)))
    assert len(first) == len(second) == len(MAIN) * 3 * 2
    assert {one.changes["num_train_epochs"] for one in first.values()} == {6}
    assert len(report) == len(MAIN) * 5
    tuning = [*first.values(), *second.values()]
    assert not {one.seed for one in tuning} & {one.seed for one in report.values()}
    assert {one.judged for one in tuning} == {TRAINED_ON}
    assert {one.judged for one in report.values()} == {HELD_OUT}
    assert [one.name for one in list(report.values())[: len(MAIN)]] == list(MAIN)  # a part of it has every kind
    assert set(MAIN) < set(CREDITS)


def test_the_better_third_goes_on_and_the_best_mean_is_chosen():
    scores = {("image", (1.0, 3.0), 0): 0.5, ("image", (1.0, 3.0), 1): 0.9, ("image", (2.0, 3.0), 0): 0.8,
              ("image", (2.0, 3.0), 1): 0.8, ("image", (4.0, 3.0), 0): 0.6, ("mask", (1.0, 3.0), 0): 0.7,
              ("mask", (2.0, 3.0), 0): 0.6}  # fmt: skip
    ranked = ranking(scores)
    assert ranked["image"] == [((2.0, 3.0), 0.8), ((1.0, 3.0), 0.7), ((4.0, 3.0), 0.6)]
    assert better_part(ranked) == {"image": [(2.0, 3.0)], "mask": [(1.0, 3.0)]}
    four = {("mask", (float(rate), 3.0), 0): rate for rate in range(4)}
    assert better_part(ranking(four)) == {"mask": [(3.0, 3.0), (2.0, 3.0)]}


def test_tuning_goes_as_far_as_its_trainings():
    options = make_parser().parse_args(["--kinds", "image", "mask", "words"])
    rounds = []

    def train(planned):
        """The higher the rate the better, but in full 6e-3 breaks, unless it is clipped; mask is the best kind."""
        rounds.append(planned)
        found = {}
        for (kind, (rate, clip), seed), training in planned.items():
            broken = (rate, clip) == (6e-3, 1e-2) and training.changes["num_train_epochs"] == 12
            score = 0.5 + 10 * rate * (not broken) + clip + 0.01 * (kind == "mask")
            found[kind, (rate, clip), seed] = replace(training_of(0, 0), judge=np.full((2, PROMPTS), score))
        return found

    tuned = tune(options, train)
    assert [len(one) for one in rounds] == [18, 6]
    assert {setting for _, setting, _ in rounds[1]} == {(6e-3, 1e-2), (6e-3, 5e-5)}
    assert tuned.settings == dict.fromkeys(options.kinds, (6e-3, 5e-5))
    assert (tuned.best, tuned.done) == ("mask", 24)
    assert count_planned(options) == 24 + 3 * 5
    tuned = tune(options, lambda planned: dict(list(train(planned).items())[1:]))
    assert (tuned.settings, tuned.best, tuned.done) == (None, None, 17)
    alone = make_parser().parse_args(["--kinds", "image", "--learning_rates", "3e-3", "--clips", "1e-2"])
    assert tune(alone, None).settings == {"image": (3e-3, 1e-2)}
    assert count_planned(alone) == 5


def test_kinds_are_compared_on_the_seeds_they_share():
    found = {("image", seed): training_of(1, seed) for seed in range(3)}
    found |= {("scalar", seed): training_of(0.5, seed) for seed in range(3)}
    found |= {("mask", seed): training_of(2, seed) for seed in (1, 2)}
    seeds, (mask, image) = together(found, ["mask", "image"])
    assert seeds == [1, 2]
    assert mask.shape == image.shape == (2, LOOKS, PROMPTS)
    rows = {row.name: row for row in report_rows(found, ["image", "scalar", "mask"], best="mask")}
    name = "mask (of which the goals are)"
    assert rows[f"{name}: at the end, less image's"].value == pytest.approx(0.1)
    less = rows[f"{name}: at the end, less scalar's"]
    assert (less.value, less.n, less.holds) == (pytest.approx(0.15), 2, True)
    assert rows[f"{name}: at 2/3 of the images, less image's at the end"].value == pytest.approx(0.2 * 2 / 3 - 0.1)
    needed = rows[f"{name}: share of the images to where image ends (2: not reached)"]
    assert (needed.value, needed.holds) == (pytest.approx(0.5), True)
    assert rows["scalar: share of the images to where image ends (2: not reached)"].value == 2


def test_a_partial_result_says_what_there_is():
    found = {("image", 0): training_of(1, 0)}
    names = [row.name for row in report_rows(found, ["image", "scalar", "mask"], best="mask")]
    assert names
    assert all(name.startswith("image") for name in names)
    assert report_rows({}, ["image", "mask"], best=None) == []
