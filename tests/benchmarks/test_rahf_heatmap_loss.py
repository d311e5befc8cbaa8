"""The table of the heatmap losses: which figures are paired with which."""

import numpy as np
import pytest
from rahf_heatmap_loss import CHOICES, METRICS, PAPER, table

from reward.feedback import HEATMAPS


def test_every_choice_is_compared_with_the_papers_by_seed_and_picture(monkeypatch):
    monkeypatch.setattr("finetune.paired.DRAWS", 200)
    noise = np.random.default_rng(0).random((2, 30))
    found = {
        choice: [
            ({(name, metric): noise[seed] + shift for name in HEATMAPS for metric in METRICS}, 0.5 + shift)
            for seed in range(2)
        ]
        for shift, choice in enumerate(CHOICES)
    }
    rows = {row.name: row for row in table(found, seeds=2)}
    for shift, choice in enumerate(CHOICES):
        assert rows[f"mean SRCC of the scores, {choice}"].value == 0.5 + shift
        if choice != PAPER:
            less = rows[f"CC implausibility, {choice} less the paper's"]
            assert (less.value, less.low, less.high) == pytest.approx((shift,) * 3)  # the noise is the same, so it goes
            assert less.n == 60
