"""The table of mended pictures, and the pictures with planted flaws."""

import inpaint_proof
import numpy as np
import pytest
from inpaint_proof import BEHIND, by_caption, mended, natural, planted, table, verdict
from long_runs import ROOT

from finetune.inpaint_arguments import InpaintArguments
from finetune.paired import paired_interval
from finetune.pictures_to_fix import Everything
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments


def row(before, after, status="fixed", prompt="a red circle"):
    sides = {"judged_before": before, "judged_after": after}
    return {
        "prompt": prompt, "status": status, "before": {"reward": 0.5}, "after": {"reward": 0.6},
        **{side: dict.fromkeys(inpaint_proof.TERMS, value) for side, value in sides.items()},
    }  # fmt: skip


def test_gains_and_shares_by_hand():
    figures = [(0.4, 0.9), (0.5, 0.5, "nothing found"), (0.6, 0.59), (0.9, 0.8)]
    seed = [row(*one, prompt=prompt) for one, prompt in zip(figures, "abcd", strict=True)]
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


def test_captions_are_the_units_and_pictures_count_alike():
    assert by_caption(np.array([1.0, 2.0, 5.0, 6.0]), list("aabb")).tolist() == [1.5, 5.5]
    assert by_caption(np.array([1.0, 1.0, 0.0, 1.0]), list("aaba")).tolist() == [1.125, 0.375]


def test_pictures_of_a_caption_that_gain_alike_are_not_more_evidence():
    """Eight captions once, and each of them twice with the same gains."""
    gains = np.random.default_rng(0).random(8)
    once = [row(0.0, gain, prompt=str(place)) for place, gain in enumerate(gains)]
    twice = [one for one in once for _ in range(2)]
    rows = {one.name: one for one in table([once + twice], {"once": slice(0, 8), "twice": slice(8, None)})}
    names = ("plausibility gain", "share that gets worse by more than 0.02", "predicted gain")
    for name in names:
        one, two = rows[f"once: {name}"], rows[f"twice: {name}"]
        assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))
    assert rows["once: plausibility gain"].low == pytest.approx(paired_interval([gains])[1])
    assert (rows["twice: captions"].value, rows["twice: captions"].n) == (8, 16)


def tiny(*more):
    flags = ["--config", str(ROOT / "configs/inpaint_tinyworld.yaml"), "--num_candidates", "1", "--rounds", "1", *more]
    return flags, parse_arguments([InpaintArguments, RewardArguments], flags)[0]


def test_no_picture_that_was_looked_at_is_reported():
    assert BEHIND >= 133
    assert [uid for uid, _, _ in planted(2)] == [f"planted{BEHIND}", f"planted{BEHIND + 1}"]
    source = tiny()[1].source()
    uids = [f"natural_{item.uid}" for item in source.pictures(Everything())]
    found = list(natural(source, 4))
    assert [uid for uid, _, _ in found] == uids[BEHIND : BEHIND + 4]
    captions = [caption for _, caption, _ in found]
    assert captions[0] == captions[1]
    assert captions[2] == captions[3]


def test_states_of_the_code_are_kept_with_what_they_mended(tmp_path, monkeypatch):
    pictures, flags = list(planted(3)), tiny()[0]
    monkeypatch.setattr(inpaint_proof, "code", lambda: "one state")
    mended(pictures[:2], tmp_path / "out", flags)
    monkeypatch.setattr(inpaint_proof, "code", lambda: "another")
    rows, _ = mended(pictures, tmp_path / "out", flags)  # goes on
    assert [one["code"] for one in rows] == ["one state", "one state", "another"]
    del rows[1]["code"]  # as earlier states kept none
    states = {one.name: one for one in table([rows], {})}["states of the code among the pictures"]
    assert (states.value, states.n) == (3, 3)


def test_too_few_pictures_for_an_interval_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["inpaint_proof.py", "--pictures", "3"])
    with pytest.raises(SystemExit):
        inpaint_proof.main()
    assert "--pictures is 3" in capsys.readouterr().err
