"""What the steps' table says of curves whose answer is known."""

import numpy as np
import pytest
from auto_steps import ALL, AUTO, NOISY, make_parser, plan, step_count, table
from trainings import CONFIG, Result

from reward.arguments import parse_arguments
from rl.ddpo import DDPOConfig
from rl.pipelines import load_scheduler
from run_ddpo import RunArguments


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("learning.DRAWS", 100)


def training_of(gain, seconds, seed):
    judged = (0.5 + gain * np.arange(4.0))[:, None] + np.random.default_rng(seed).normal(0, 0.01, 6)
    return Result(np.arange(4), 64 * np.arange(4), seconds * np.arange(4.0), judge=judged, satisfied=judged > 0.5,
                  reward=np.zeros(4), evaluated=[], watched=[], wall=1.0)  # fmt: skip


def test_every_way_fits_the_config(tmp_path):
    """One update a rollout, whatever is trained; and the demo has as many steps with noise as it is said to have."""
    run, args = parse_arguments([RunArguments, DDPOConfig], ["--config", CONFIG, "--output_dir", str(tmp_path)])
    _, schedule = args.make_schedule(load_scheduler(run.policy))
    for (steps, _), training in plan(make_parser().parse_args(["--seeds", "1"])).items():
        _, args = parse_arguments([RunArguments, DDPOConfig], training.argv(str(tmp_path)))
        trained = args.steps_per_rollout(schedule)
        assert args.plan(trained).updates == 1
        assert trained == step_count(steps) == (NOISY if steps == ALL else 2)


def test_half_the_time_to_the_same_score():
    """auto gains as much a rollout in a third of the time: it takes a third of it. A window gains 0.3 more."""
    found = {(AUTO, seed): training_of(0.1, 1, seed) for seed in range(3)}
    found |= {(ALL, seed): training_of(0.1, 3, seed) for seed in range(3)}
    found |= {("1:3", seed): training_of(0.2, 1, seed) for seed in range(2)}
    found |= {("2:4", seed): training_of(0.0, 1, seed) for seed in range(2)}
    rows = {row.name: row for row in table(found, ["1:3", "2:4", "3:5"])}
    time = rows["time of auto:2 to the same score, of all's (2: not reached)"]
    assert (time.value, time.holds, time.n) == (pytest.approx(1 / 3), True, 3)
    less = rows["judge at the end, auto:2 less the window 1:3 (the best by hand)"]
    assert (less.value, less.holds, less.n) == (pytest.approx(-0.3), False, 2)
    assert rows["judge at the end, auto:2 less the window 2:4"].holds is None
    assert rows["steps all: seconds of it"].value == 9


def test_a_partial_result_compares_nothing_that_is_not_there():
    rows = table({(AUTO, 0): training_of(0.1, 1, 0)}, ["1:3"])
    assert all(row.name.startswith("steps auto:2") for row in rows)
