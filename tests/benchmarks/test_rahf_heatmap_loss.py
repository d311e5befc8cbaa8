"""The table of the heatmap losses, which figures are paired with which; and a training."""

import json

import numpy as np
import pytest
from heatmap_loss_training import train_once
from parts import Task
from rahf_heatmap_loss import CHOICES, CONFIG, METRICS, PAPER, table
from report import over_seeds

from reward import richhf
from reward.feedback import HEATMAPS
from reward.rahf_config import RahfConfig


def test_every_choice_is_compared_with_the_papers_by_seed_and_picture():
    noise = np.random.default_rng(0).random((2, 30))
    found = {
        choice: [
            {
                "values": {name: {metric: (noise[seed] + shift).tolist() for metric in METRICS} for name in HEATMAPS},
                "srcc": 0.5 + shift + 0.01 * seed,
            }
            for seed in range(2)
        ]
        for shift, choice in enumerate(CHOICES)
    }
    rows = {row.name: row for row in table(found)}
    for shift, choice in enumerate(CHOICES):
        assert rows[f"mean SRCC of the scores, {choice}"].value == pytest.approx(0.505 + shift)
        if choice != PAPER:
            for name in ("CC implausibility", "mean SRCC of the scores"):
                less = rows[f"{name}, {choice} less the paper's"]
                assert (less.value, less.low, less.high) == pytest.approx((shift,) * 3)  # the noise is the same
            assert rows[f"CC implausibility, {choice} less the paper's"].n == 60


def test_an_interval_over_seeds_is_students():
    mean, low, high = over_seeds(np.array([1.0, 2.0, 3.0]))
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert over_seeds(np.array([1.0])) == (1.0, None, None)


@pytest.fixture
def trained(raw_data, model_folder):
    """A training of two steps on twelve pictures, by settings, and the folder of its model."""
    data = raw_data / "data"
    richhf.main(["--tfrecords", str(raw_data / "tfrecords"), "--images", str(raw_data / "images"), "--out", str(data)])

    def train(name, **settings):
        how = {"data": str(data), "model": str(model_folder), "config": CONFIG, "steps": 2, "settings": settings}
        folder = raw_data / name
        return train_once(Task(folder, 0, how, ())), folder / "rahf"

    return train


def test_a_training_is_judged_on_dev_and_its_choice_matters(trained):
    plain, folder = trained("plain")
    heavier, other = trained("heavier", heatmap_positive_weight=10)
    assert RahfConfig.from_pretrained(folder).heatmap_positive_weight == 1
    assert RahfConfig.from_pretrained(other).heatmap_positive_weight == 10
    for name in HEATMAPS:
        marked, all_ = len(plain["values"][name]["cc"]), len(plain["values"][name]["mse"])
        assert all_ == 6 == marked + len(plain["values"][name]["mse_empty"])
        # Whatever is marked pulls the map up, and so the mean of what it says, empty maps included.
        assert sum(heavier["values"][name]["mse_empty"]) > sum(plain["values"][name]["mse_empty"])
    assert -1 <= plain["srcc"] <= 1
    assert json.loads(json.dumps(plain)) == plain
