"""The table of mended pictures, and the pictures with planted flaws."""

import inpaint_proof
import numpy as np
import pytest
from inpaint_proof import planted, table, verdict


def row(before, after, status="fixed"):
    sides = {"judged_before": before, "judged_after": after}
    return {
        "status": status, "before": {"reward": 0.5}, "after": {"reward": 0.6},
        **{side: dict.fromkeys(inpaint_proof.TERMS, value) for side, value in sides.items()},
    }  # fmt: skip


def test_gains_and_shares_by_hand():
    seed = [row(0.4, 0.9), row(0.5, 0.5, "nothing found"), row(0.6, 0.59), row(0.9, 0.8)]
    rows = {one.name: one for one in table([seed, seed], {"planted": slice(0, 2), "natural": slice(2, None)})}
    assert rows["planted: plausibility gain"].value == pytest.approx(0.25)
    assert rows["all: plausibility gain"].value == pytest.approx(0.39 / 4)
    assert rows["all: plausibility gain"].goal == "low > 0"
    assert rows["all: share that gets worse"].value == 0.5
    assert rows["all: share that gets worse"].holds is False
    assert rows["all: share that gets worse by more than 0.02"].value == 0.25
    assert rows["natural: share that is drawn anew"].value == 1
    assert rows["all: predicted gain"].value == pytest.approx(0.1)


def test_planted_flaws_are_of_outline_and_seen_by_the_judge():
    pictures = list(planted(6))
    assert [uid for uid, _, _ in pictures] == [uid for uid, _, _ in planted(6)]
    scores = [verdict(picture, caption) for _, caption, picture in pictures]
    assert np.mean([one["plausibility"] for one in scores]) < 0.7
    assert min(one["alignment"] for one in scores) > 0.6
