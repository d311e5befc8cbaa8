"""The problem region drawn again: which candidate is kept, and settings out of range."""

from dataclasses import replace

import pytest
import torch

from finetune.mending import FIXED, NO_BETTER, NOTHING, TOO_LARGE, mend
from tests.finetune.inpaint_case import Blue, NoMaps, arguments, blue_spot


class Painter:
    """Draws candidates of one grey after another, those of each call by its number."""

    def __init__(self, *calls):
        self.calls, self.shares, self.seeds = list(calls), [], []

    def __call__(self, picture, share, prompt, generators):
        self.shares.append(share)
        self.seeds.append([one.initial_seed() for one in generators])
        return torch.stack([torch.full_like(picture, value) for value in self.calls.pop(0)])


def test_the_best_candidate_is_kept_and_mended_again():
    painter = Painter([0.9, 0.6, 0.8], [0.3, 0.2, 0.4])
    picture = blue_spot()
    mended = mend(picture, "a red circle", "one", arguments(), Blue(), painter)
    assert mended.status == FIXED
    assert [one.kept for one in mended.rounds] == [1, 1]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert (mended.picture[:, inside] == 51).all()
    assert torch.equal(mended.picture[:, ~inside], picture[:, ~inside])
    assert torch.equal(mended.share, inside.float())
    assert float(mended.before.objective) == pytest.approx(1 - 1 / 16)
    assert float(mended.after.objective) == pytest.approx(1 - 0.2 / 16, abs=1e-4)
    assert len({seed for call in painter.seeds for seed in call}) == 6


def test_a_picture_is_never_kept_that_is_not_better():
    picture = blue_spot()
    picture[2, 4:8, 4:8] = 200
    mended = mend(picture, "a", "one", arguments(), Blue(), Painter([1.0, 0.9, 1.0]))
    assert mended.status == NO_BETTER
    assert torch.equal(mended.picture, picture)
    assert torch.equal(mended.after.objective, mended.before.objective)
    assert [one.kept for one in mended.rounds] == [None]
    assert mended.share.sum() == 16  # what was tried


class RoundsByBatch(Blue):
    """A reward that a picture gets more of, or less, in larger company, as rounding may have it."""

    def __init__(self, sign):
        self.sign, self.asked = sign, []

    def __call__(self, images, prompts):
        self.asked.append(images)
        said = super().__call__(images, prompts)
        return replace(said, total=said.total + self.sign * 1e-4 * len(images))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [6]), (6, [6]), (5, [4, 4]), (3, [3, 3, 3]), (1, [2] * 5)])
def test_other_company_alone_makes_no_candidate_better(sign, batch_size, sizes):
    """Candidates are compared in questions of one size, each of which holds the picture."""
    picture, reward = blue_spot(), RoundsByBatch(sign)
    run = arguments(num_candidates=5, batch_size=batch_size)
    drawn = mend(picture, "a", "one", run, reward, lambda picture, *_: torch.stack([picture] * 5))
    assert drawn.status == NO_BETTER
    assert drawn.rounds[0].scores == (float(drawn.before.objective),) * 5
    assert [len(images) for images in reward.asked[1:]] == sizes  # the first one asks where it is wrong
    assert all(torch.equal(images[0], picture / 255) for images in reward.asked)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8])
@pytest.mark.parametrize("best", [0, 2, 4])
def test_the_best_is_found_in_whichever_question_it_was(batch_size, best):
    shades = [0.9] * 5
    shades[best] = 0.2
    run = arguments(num_candidates=5, batch_size=batch_size, rounds=1)
    mended = mend(blue_spot(), "a", "one", run, Blue(), Painter(shades))
    assert mended.rounds[0].kept == best
    assert mended.rounds[0].scores == pytest.approx([1 - shade / 16 for shade in shades], abs=1e-3)
    assert (mended.picture[2, 4:8, 4:8] == 51).all()
    assert float(mended.after.objective) == mended.rounds[0].scores[best]
    assert float(mended.before.objective) == pytest.approx(1 - 1 / 16)


def test_min_gain_and_a_second_round_that_is_no_better():
    gain = 0.5 / 16  # from full to half blue
    kept = mend(blue_spot(), "a", "one", arguments(min_gain=gain - 0.01), Blue(), Painter([0.9, 0.5, 1.0], [0.9] * 3))
    assert kept.status == FIXED
    assert [one.kept for one in kept.rounds] == [1, None]
    assert (kept.picture[2, 4:8, 4:8] == 128).all()
    left = mend(blue_spot(), "a", "one", arguments(min_gain=gain + 0.01), Blue(), Painter([0.9, 0.5, 1.0]))
    assert left.status == NO_BETTER


def test_an_empty_region_and_one_that_is_too_large_keep_the_picture():
    red = blue_spot(rows=slice(0, 0))
    nothing = mend(red, "a", "one", arguments(), Blue(), Painter())
    assert nothing.status == NOTHING
    assert torch.equal(nothing.picture, red)
    assert nothing.share.sum() == 0
    full = blue_spot(rows=slice(0, 16), columns=slice(0, 16))
    kept = mend(full, "a", "one", arguments(), Blue(), Painter())
    assert kept.status == TOO_LARGE
    assert torch.equal(kept.picture, full)
    allowed = mend(full, "a", "one", arguments(max_area=1.0), Blue(), Painter([0.1] * 3))
    assert allowed.status == FIXED
    assert (allowed.picture == 26).all()


def test_thresholds_of_maps_that_the_reward_has_not():
    with pytest.raises(ValueError, match="thresholds names blue, but the reward's penalty maps are none"):
        mend(blue_spot(), "a", "one", arguments(), NoMaps(), Painter())
    with pytest.raises(ValueError, match="thresholds names implausibility, but the reward's penalty maps are blue"):
        mend(blue_spot(), "a", "one", arguments(thresholds={"implausibility": 0.1}), Blue(), Painter())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": []}, "neither is given"),
        ({"pictures": "somewhere"}, "both are given"),
        ({"thresholds": {}}, "thresholds is empty"),
        ({"thresholds": {"blue": "high"}}, "that of 'blue' is 'high'"),
        ({"thresholds": {"blue": -0.1}}, "that of 'blue' is -0.1"),
        ({"thresholds": {"blue": float("nan")}}, "that of 'blue' is nan"),
        ({"num_candidates": 0}, "num_candidates is 0; it must be at least 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"strength": 0.0}, r"strength is 0.0; it must lie in \(0, 1\]"),
        ({"strength": 0.01}, "strength 0.01 of 50 steps is less than one step"),
        ({"max_area": 1.5}, "max_area is 1.5"),
        ({"feather": -0.1}, "feather is -0.1; it must not be negative"),
        ({"eta": 2.0}, "eta is 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        arguments(**changes)
