"""Evaluation, its files, and the pictures."""

import json

import pytest
import torch

from rl.evaluate import evaluate, look
from rl.policy import StableDiffusionPolicy
from rl.report import paired_change, write_report
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS, full_disk
from tests.rl.toy_rewards import Plain, Redness

REWARDS = {"reward": Redness(), "judge": Plain()}


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return StableDiffusionPolicy.load(pipeline_folder, lora_rank=2)


@pytest.fixture(scope="module")
def schedule(policy):
    return make_schedule(ddim_scheduler(policy.scheduler), 3, 1.0)


def test_figures_do_not_depend_on_batch_size_or_ranks(policy, schedule):
    settings = {"generations": 2, "seed": 0}
    whole = evaluate(policy, schedule, PROMPTS, REWARDS, batch_size=10, **settings)
    small = evaluate(policy, schedule, PROMPTS, REWARDS, batch_size=3, **settings)
    torch.testing.assert_close(whole.values, small.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.diversity, small.diversity, rtol=1e-4, atol=1e-4)

    parts: list[list[torch.Tensor]] = []
    for rank in range(2):  # a gather that hands back what the other rank would have sent
        seen = []
        evaluate(
            policy, schedule, PROMPTS, REWARDS, batch_size=6, rank=rank, world_size=2,
            gather=lambda tensor, seen=seen: (seen.append(tensor), torch.cat([tensor, tensor]))[1], **settings,
        )  # fmt: skip
        parts.append(seen)
    both = iter([torch.cat(pair) for pair in zip(*parts, strict=True)])
    ranks = evaluate(
        policy, schedule, PROMPTS, REWARDS, batch_size=6, rank=0, world_size=2, gather=lambda _: next(both), **settings
    )
    torch.testing.assert_close(whole.values, ranks.values, rtol=1e-4, atol=1e-4)


def test_summary_names(policy, schedule):
    summary = evaluate(policy, schedule, PROMPTS, REWARDS, generations=2, seed=0).summary()
    assert {"reward", "reward.red", "judge.total", "judge.satisfied", "diversity", "n"} <= summary.keys()
    assert summary["n"] == 5
    assert summary["diversity"] > 0
    alone = evaluate(policy, schedule, PROMPTS[:1], REWARDS, generations=1, seed=0).summary()
    assert alone["diversity"] is None


def test_look_shows_the_pictures_that_were_judged(policy, schedule):
    figures = evaluate(policy, schedule, PROMPTS, REWARDS, generations=2, seed=0)
    samples = look(policy, schedule, PROMPTS, REWARDS["reward"], count=2, generations=2, seed=0)
    assert samples.prompts == [PROMPTS[0], PROMPTS[2]]
    torch.testing.assert_close(
        samples.reward.objective, figures.values["reward"][[0, 2], 0], rtol=1e-4, atol=1e-4
    )  # fmt: skip


def test_report_files(policy, schedule, tmp_path):
    figures = evaluate(policy, schedule, PROMPTS, REWARDS, generations=2, seed=0)
    samples = look(policy, schedule, PROMPTS, REWARDS["reward"], count=3, generations=2, seed=0)
    write_report(tmp_path, figures, figures, (samples, samples), {"seconds": {"total": 1.0}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["before"] == summary["after"]
    assert summary["seconds"] == {"total": 1.0}
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(evaluation["after"]["judge.satisfied"]) == len(evaluation["prompts"]) == 5
    assert (tmp_path / "before_after.png").stat().st_size > 1000
    (tmp_path / "summary.json").write_text("an earlier one")
    with full_disk(500), pytest.raises(OSError, match="too large"):
        write_report(tmp_path, figures, figures, (samples, samples), {})
    assert (tmp_path / "summary.json").read_text() == "an earlier one"
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "evaluation.json", "before_after.png"}


def test_interval_of_a_paired_change_is_over_prompts():
    before, after = torch.zeros(4, 2), torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [3.0, 3.0]])
    change, half_width = paired_change(before, after)
    assert change == 2
    assert half_width == pytest.approx(1.96 * (4 / 3) ** 0.5 / 2)
