"""When a learning curve reaches a level, by hand."""

import numpy as np
import pytest
from learning import NOT_REACHED, mean_curve, ratio_to_same_level, reached, resampled, share_needed

from finetune.paired import paired_interval

AXIS = np.array([0.0, 10.0, 20.0, 30.0])


@pytest.mark.parametrize(
    ("curve", "level", "place"),
    [
        ([1, 2, 4, 5], 3, 15),  # between two looks
        ([1, 2, 4, 5], 4, 20),
        ([1, 2, 4, 5], 0.5, 0),  # from the start
        ([1, 2, 4, 5], 5.1, np.inf),
        ([1, 3, 1, 5], 2, 10),  # 3 and 1 are 2 and 2: the peak of 3 at 10 is noise
        ([1, 3, 1, 5], 3, 20 + 10 / 3),
        ([3, 2, 1, 0], 2, np.inf),  # a falling curve is its mean, 1.5
    ],
)
def test_where_a_level_is_reached(curve, level, place):
    assert reached(AXIS, np.array(curve, float), level) == pytest.approx(place)


def test_the_share_of_the_images():
    image = np.array([0.0, 1, 2, 3])
    assert share_needed(AXIS, image, image) == 1
    assert share_needed(AXIS, 2 * image, image) == pytest.approx(0.5)
    assert share_needed(AXIS, image / 2, image) == NOT_REACHED
    assert share_needed(AXIS, np.full_like(image, image.mean()), image[::-1]) == NOT_REACHED  # it has learned nothing


def test_the_same_score_is_the_lower_end():
    """At half the price and twice the gain a rollout: it is where the other ends after a quarter of the time."""
    slow = np.array([0.0, 1, 2, 3])
    assert ratio_to_same_level(AXIS / 2, 2 * slow, AXIS, slow) == pytest.approx(0.25)
    assert ratio_to_same_level(AXIS, slow, AXIS / 2, 2 * slow) == NOT_REACHED  # 4
    assert ratio_to_same_level(AXIS, np.zeros(4), AXIS, np.zeros(4)) == NOT_REACHED


def test_resampling_is_that_of_paired_intervals():
    """Where there are many seeds: of few, a bootstrap is too sure."""
    table = np.random.default_rng(0).normal(0.3, 1, (40, 1, 50)) + np.linspace(0, 4, 40)[:, None, None]
    found = resampled(lambda seeds, prompts: mean_curve(table, seeds, prompts)[0], 40, 50)
    assert found == pytest.approx(paired_interval(list(table[:, 0])), abs=0.06)


def test_a_mean_curve_weighs_the_seeds_and_prompts_that_were_drawn():
    curves = np.arange(12.0).reshape(2, 2, 3)
    drawn = mean_curve(curves, np.array([1, 1]), np.array([1.0, 0, 0]))
    assert drawn.tolist() == [6, 9]
