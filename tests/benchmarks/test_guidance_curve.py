"""The curve's table: what is paired with what, and where it says that guidance breaks; and what is drawn and timed."""

import guidance_curve
import numpy as np
import pytest
import torch
from guidance_curve import TERMS, Curve, settings, table
from long_runs import ROOT


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


def test_neighbouring_scales_are_compared_on_the_same_noise():
    noise = np.random.default_rng(0).random((2, 30))
    shifts = {0.0: 0.0, 0.4: 0.25, 0.1: 0.2}
    found = {scale: [said(shift, noise[seed]) for seed in range(2)] for scale, shift in shifts.items()}
    rows = {row.name: row for row in table(found, chosen=0.1)}
    more = rows["from scale 0.1 to 0.4: overall gain"]
    assert (more.value, more.low, more.high) == pytest.approx((0.05,) * 3)
    assert more.n == 60
    assert [name for name in rows if name.startswith("from scale")] == [
        f"from scale 0.1 to 0.4: {name} gain" for name in ("reward", *TERMS)
    ]


def curve_of(tmp_path, *more):
    flags = ["--config", str(ROOT / "configs/guide_tinyworld.yaml"), "--num_inference_steps", "2", *more]
    return Curve(*settings(flags), ["a red circle", "a blue square"], tmp_path)


def test_a_step_costs_what_more_steps_cost_more(tmp_path, monkeypatch):
    """100 s a picture beside its steps, 3 s a step: only these count."""
    clock = [0.0]

    def draw(places, seed, guidance, steps):
        clock[0] += len(places) * (100 + 3 * steps)

    curve = curve_of(tmp_path)
    monkeypatch.setattr(curve, "draw", draw)
    monkeypatch.setattr(guidance_curve.time, "process_time", lambda: clock[0])
    assert curve.milliseconds(None) == pytest.approx(3000)


def test_pictures_follow_steps_and_resolution(tmp_path):
    assert curve_of(tmp_path).draw(range(2), 0, None).shape == (2, 3, 64, 64)
    curve = curve_of(tmp_path, "--resolution", "128")
    two, three = (curve.draw(range(1), 0, None, steps) for steps in (None, 3))
    assert two.shape == (1, 3, 128, 128)
    assert not torch.equal(two, three)


@pytest.mark.parametrize("flag", ["num_generations", "seed"])
def test_settings_that_the_curve_would_ignore_are_refused(tmp_path, flag):
    with pytest.raises(SystemExit, match=f"error: {flag} is 3; leave it out"):
        curve_of(tmp_path, f"--{flag}", "3")


def test_states_of_the_code_that_drew_are_counted(tmp_path, monkeypatch):
    curve = curve_of(tmp_path)
    old = curve.said(0, 0.0)
    del old["code"]  # as earlier states kept none
    monkeypatch.setattr(guidance_curve, "code", lambda: "one state")
    first = curve.said(1, 0.0)
    monkeypatch.setattr(guidance_curve, "code", lambda: "another")
    assert str(first["code"]) == str(curve.said(1, 0.0)["code"]) == "one state"  # which it was drawn by
    found = {0.0: [old, first], 0.1: [old, curve.said(1, 0.1)]}
    rows = {row.name: row for row in table(found, chosen=0.1)}
    states = rows["states of the code among the pictures"]
    assert (states.value, states.n) == (3, 4)
