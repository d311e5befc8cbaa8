"""The bar of a run: its updates, the time left, the newest reward."""

import io
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from rl.callbacks import RewardProgress

HERE = SimpleNamespace(is_world_process_zero=True)


@pytest.mark.parametrize(
    ("logs", "shown", "hidden"),
    [
        ({"reward": 0.73125, "watch/drawn": 0.987}, ["reward=0.7312", "drawn=0.99"], []),
        ({"reward": 0.5}, ["reward=0.5000"], ["drawn"]),
        ({"loss": 0.5}, [], ["reward", "loss"]),
    ],
)
def test_the_newest_reward_and_the_time_left_stand_behind_the_bar(logs, shown, hidden):
    progress, screen = RewardProgress(), io.StringIO()
    progress.training_bar = tqdm(total=4, file=screen, mininterval=0, ncols=100)
    progress.training_bar.update(2)
    progress.on_log(None, HERE, None, logs=logs)
    progress.training_bar.refresh()
    said = screen.getvalue().split("\r")[-1]
    assert "2/4" in said
    assert "<00:" in said, "the time left"
    assert all(text in said for text in shown)
    assert not any(text in said for text in hidden)
    progress.training_bar.close()


def test_a_rank_without_a_bar_shows_nothing():
    RewardProgress().on_log(None, SimpleNamespace(is_world_process_zero=False), None, logs={"reward": 1.0})
