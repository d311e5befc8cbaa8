"""What the judge holds against an outline, and what it does not: `Fit.play` and `Fit.corners`."""

import numpy as np
import pytest

from tinyworld.fit import cover, fit
from tinyworld.grammar import COLOURS, GROUND
from tinyworld.judge import judge
from tinyworld.scenes import SIZE, Thing, render

EVERYWHERE = np.ones((SIZE, SIZE), np.float32)
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE] + 0.5


def picture_of(share: np.ndarray, colour: str = "black") -> np.ndarray:
    ground, ink = np.array(GROUND), np.array(COLOURS[colour])
    return np.round(ground + share[..., None] * (ink - ground)).astype(np.uint8)


def wavy_disk(harmonic: int, amplitude: float, radius: float = 12.0) -> np.ndarray:
    """A disk whose radius goes up and down, pixels; by its distance along the ray, so exact to second order."""
    across, along = COLUMNS - SIZE / 2, ROWS - SIZE / 2
    edge = radius + amplitude * np.cos(harmonic * np.arctan2(along, across))
    return np.clip(0.5 + edge - np.hypot(across, along), 0, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "play"),
    [("diamond", (0.06,)), ("cross", (0.1, -0.05, 0.0, 0.08)), ("star", (0.1, 0.0, -0.08, 0.0, 0.05)), ("circle", ())],
)
def test_play_is_found_and_costs_nothing(shape, play):
    found = next(one for one in fit(cover(shape, 30, 33, 13, play), EVERYWHERE) if one.shape == shape)
    assert found.play == pytest.approx(play, abs=0.025)
    assert found.iou > 0.97


def test_play_has_its_limits():
    short = judge(picture_of(cover("cross", 32, 32, 14, (0.08, 0.0, 0.0, 0.0))), "a black cross")
    long = judge(picture_of(cover("cross", 32, 32, 14, (0.45, 0.0, 0.0, 0.0))), "a black cross")
    assert short.satisfied
    assert long.flaws == {"malformed"}
    leaning = judge(picture_of(cover("diamond", 32, 32, 14, (0.07,))), "a black diamond")
    oblong = judge(picture_of(cover("diamond", 32, 32, 14, (0.3,))), "a black diamond")
    assert leaning.satisfied
    assert oblong.flaws == {"malformed"}


@pytest.mark.parametrize("amplitude", [0.3, 0.6])
def test_corners_are_the_amplitude_of_the_fourth_harmonic(amplitude):
    for harmonic, wanted in ((4, amplitude), (3, 0.0), (5, 0.0)):
        found = next(one for one in fit(wavy_disk(harmonic, amplitude), EVERYWHERE) if one.shape == "circle")
        assert found.corners == pytest.approx(wanted, abs=0.08)


def test_a_squarish_circle_is_seen_before_a_wavy_one():
    """The same half a pixel: four corners make another shape of it, seven ripples do not."""
    assert judge(picture_of(wavy_disk(4, 0.45)), "a black circle").flaws == {"malformed"}
    assert judge(picture_of(wavy_disk(7, 0.3)), "a black circle").satisfied
    assert judge(picture_of(wavy_disk(0, 0.0)), "a black circle").satisfied


@pytest.mark.parametrize(("down", "satisfied"), [(0, True), (16, True), (27, False), (40, False)])
def test_a_relation_is_taken_less_strictly_than_it_is_drawn(down, satisfied):
    things = (Thing("red", "circle", 16, 12, 8), Thing("blue", "square", 36, 12 + down, 8))
    verdict = judge(render(things), "a red circle left of a blue square")
    assert verdict.satisfied == satisfied
    assert ("relation" in verdict.flaws) == (not satisfied)
