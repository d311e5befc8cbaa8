"""The curve's table: what is paired with what, and where it says that guidance breaks."""

import numpy as np
import pytest
from guidance_curve import TERMS, table


def said(shift, noise):
    return dict.fromkeys(("reward", *TERMS), noise + shift)


def test_gains_are_over_the_same_noise_and_the_break_is_the_smallest_scale_that_falls():
    noise = np.random.default_rng(0).random((2, 30))
    shifts = {0.0: 0.0, 0.1: 0.2, 0.4: -0.1, 0.8: -0.3}
    found = {scale: [said(shift, noise[seed]) for seed in range(2)] for scale, shift in shifts.items()}
    rows = {row.name: row for row in table(found, chosen=0.1)}
    gain = rows["scale 0.1: overall gain"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.2,) * 3)
    assert (gain.goal, gain.holds, gain.n) == ("low > 0", True, 60)
    assert rows["scale 0.4: overall gain"].goal is None
    assert rows["smallest scale at which the judge's overall falls"].value == 0.4
    assert "smallest scale at which the judge's overall falls" not in {
        row.name for row in table({scale: found[scale] for scale in (0.0, 0.1)}, chosen=0.1)
    }
