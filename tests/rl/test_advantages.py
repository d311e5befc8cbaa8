import json

import pytest
import torch

from rl.advantages import PromptStatistics, group_advantages, keep_groups_that_differ


def test_advantages_are_z_scores_within_groups():
    values = torch.tensor([1.0, 3.0, 10.0, 10.0, 0.0, 4.0])
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0, 1.0])
    torch.testing.assert_close(group_advantages(values, 2, std_floor=1e-3), expected)


def test_std_floor_keeps_small_differences_small():
    values = torch.tensor([0.0, 1e-4])
    torch.testing.assert_close(group_advantages(values, 2, std_floor=0.01), torch.tensor([-0.005, 0.005]))


def test_batch_scale_keeps_the_groups_relative_sizes_and_clip_cuts():
    values = torch.tensor([-1.0, 1.0, -3.0, 3.0])
    torch.testing.assert_close(
        group_advantages(values, 2, 1e-3, scale="batch"), torch.tensor([-1.0, 1.0, -3.0, 3.0]) / 5**0.5
    )
    assert group_advantages(values, 2, 1e-3, clip=0.5).tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert group_advantages(values, 2, 1e-3, scale="none").tolist() == values.tolist()


def test_the_whole_rollout_may_be_the_group():
    values = torch.tensor([0.0, 1.0, 2.0, 5.0])
    expected = (values - 2.0) / values.std(correction=0)
    torch.testing.assert_close(group_advantages(values, 4, 1e-3), expected)


def test_groups_that_are_alike_are_skipped_and_the_others_stand_for_them():
    values = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.3, 0.4, 2.0, 2.0])
    kept, skipped = keep_groups_that_differ(torch.ones(8), values, 2, min_std=0.1)
    assert kept.tolist() == [4.0, 4.0, 0, 0, 0, 0, 0, 0]
    assert skipped == 0.75
    kept, skipped = keep_groups_that_differ(torch.ones(8), values, 2, min_std=0.0)
    assert kept.tolist() == [2.0, 2.0, 0, 0, 2.0, 2.0, 0, 0]
    kept, skipped = keep_groups_that_differ(torch.ones(4), torch.zeros(4), 2, min_std=0.0)
    assert not kept.any()
    assert skipped == 1


def test_prompts_are_compared_with_their_own_past():
    statistics = PromptStatistics(buffer_size=3, min_count=3)
    first = statistics.advantages(["a", "b"], torch.tensor([1.0, 3.0]), 1e-3)
    assert first.tolist() == [-1.0, 1.0]  # with the rollout: mean 2, std 1
    statistics.advantages(["a", "a"], torch.tensor([2.0, 3.0]), 1e-3)
    values = torch.tensor([4.0, 10.0])
    last = statistics.advantages(["a", "b"], values, 1e-3)  # a: 2, 3, 4, the 1 forgotten; b has been seen twice
    assert last[0] == pytest.approx((4 - 3) / (2 / 3) ** 0.5)
    assert last[1] == pytest.approx(1.0)  # the rollout's mean is 7, its std 3
    plain = PromptStatistics(3, 3)
    plain.load(json.loads(json.dumps(statistics.state())))
    for scale in ("none", "batch"):
        assert torch.equal(
            plain.advantages(["a", "b"], values, 1e-3, scale=scale),
            statistics.advantages(["a", "b"], values, 1e-3, scale=scale),
        )
    assert statistics.advantages(["a", "b"], torch.tensor([90.0, 3.0]), 1e-3, clip=0.5).tolist() == [0.5, -0.5]
