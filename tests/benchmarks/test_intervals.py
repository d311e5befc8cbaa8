"""What the benchmarks' claims rest on: paired intervals and goals."""

import numpy as np
import pytest
from report import Row

from finetune.paired import paired_interval


def test_seeds_that_disagree_widen_the_interval():
    prompts = np.random.default_rng(0).normal(0, 0.1, 400)
    _, low, high = paired_interval([prompts + shift for shift in (-1.0, 0.0, 1.0)])
    assert low < -0.5
    assert high > 0.5


@pytest.mark.parametrize(
    ("goal", "holds"),
    [(None, None), (">= 1.5", True), ("> 1.5", False), ("low > 0", True), ("high < 1.9", False), ("<= 2", True)],
)
def test_goals(goal, holds):
    assert Row("speed", 1.5, 0.1, 2.0, goal=goal).holds is holds
