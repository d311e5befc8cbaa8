from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from reward.feedback import SCORES
from tinyworld.grammar import COLOURS, GROUND, SHAPES, draw_request, is_held_out, parse
from tinyworld.judge import KINDS, JudgeReward, diversity, judge, layout_distance, overall_of
from tinyworld.scenes import FLAWS, SIZE, Thing, applicable, lay_out, plant, render

OUTLINE = ("warped", "bitten", "blotched")
# Only outlines are wrong by degrees: another colour or shape, or a thing too few, is that or not.
PLANTED = [(flaw, strength) for flaw in FLAWS for strength in ((0.3, 0.6, 1.0) if flaw in OUTLINE else (1.0,))]
KIND = {
    **dict.fromkeys(OUTLINE, "malformed"),
    "swapped": "relation",
    **{flaw: flaw for flaw in ("wrong colour", "wrong shape", "missing", "extra")},
}


def _scenes(count, seed, flaw=None):
    rng = np.random.default_rng(seed)
    scenes = []
    while len(scenes) < count:
        scene = lay_out(draw_request(rng), rng)
        if flaw is None or flaw in applicable(scene):
            scenes.append(scene)
    return scenes


@cache
def _clean(scene):
    """The judge's verdict on a scene as it was meant. Scenes of one seed are drawn for several flaws."""
    return judge(render(scene.things), str(scene.request))


def _softened(picture, rng):
    """About what an autoencoder's round trip does to a picture."""
    blurred = ndimage.gaussian_filter(picture.astype(float), (0.5, 0.5, 0)) + rng.normal(0, 4, picture.shape)
    return np.clip(np.round(blurred), 0, 255).astype(np.uint8)


def test_clean_renders_are_satisfied_held_out_compositions_too():
    scenes = _scenes(250, seed=0)
    assert sum(is_held_out(scene.request) for scene in scenes) >= 25
    verdicts = [_clean(scene) for scene in scenes]
    # Of so many, 0.988 shows the 0.98 that is claimed: a judge that is right on 96% passes once in a hundred times.
    assert np.mean([verdict.satisfied for verdict in verdicts]) >= 0.988
    assert np.mean([verdict.plausibility > 0.98 and verdict.alignment > 0.98 for verdict in verdicts]) >= 0.988
    for scene, verdict in zip(scenes[:100], verdicts, strict=False):
        for thing in verdict.things:
            off = min(
                np.hypot(thing.x - true.x, thing.y - true.y) + abs(thing.radius - true.radius)
                for true in scene.things
                if (true.colour, true.shape) == (thing.colour, thing.shape)
            )
            assert off < 0.3, "place and size are found to a fraction of a pixel"


_planted = {}


def _cases(flaw, strength):
    """(right score fell, wrong one stayed, IoU or None, words right, kind right, fall of aesthetics), 40 scenes."""
    if (flaw, strength) not in _planted:
        rng, cases = np.random.default_rng(1), []
        for scene in _scenes(40, seed=int(10 * strength), flaw=flaw):
            clean, flawed = _clean(scene), plant(scene, flaw, strength, rng)
            verdict = judge(flawed.picture, str(scene.request))
            falls = {name: clean.scores[name] - verdict.scores[name] for name in SCORES}
            right, wrong = ("plausibility", "alignment") if flaw in OUTLINE else ("alignment", "plausibility")
            mask = verdict.implausible if flaw in OUTLINE else verdict.misaligned
            iou = (mask & flawed.region).sum() / (mask | flawed.region).sum() if flawed.region.any() else None
            cases.append(
                (
                    falls[right] > 0.05 and verdict.overall < clean.overall and not verdict.satisfied,
                    abs(falls[wrong]) <= 0.05,
                    iou,
                    verdict.words == flawed.words,
                    verdict.flaws == {KIND[flaw]},
                    falls["aesthetics"],
                )
            )
        _planted[flaw, strength] = cases
    return _planted[flaw, strength]


@pytest.mark.parametrize(("flaw", "strength"), PLANTED)
def test_planted_flaws_lower_the_score_they_should_and_no_other(flaw, strength):
    fell, stayed, _, words, kind, _ = (np.array(column) for column in zip(*_cases(flaw, strength), strict=True))
    if (flaw, strength) == ("warped", 1.0):  # such a wave may make one shape another: then the word is wrong too
        assert words.mean() >= 0.9
        assert kind.mean() >= 0.9
    else:
        assert words.all()
        assert kind.all()
    assert (fell & stayed).mean() >= 0.9  # a faint flaw may cost less than 0.05, a large bite hide what a thing was


@pytest.mark.parametrize("flaw", FLAWS)
def test_aesthetics_fall_with_blemishes_and_with_empty_places_alone(flaw):
    """Sizes and balance of a true picture change by chance where things change, either way; a colour changes none."""
    strengths = [strength for name, strength in PLANTED if name == flaw]
    falls = np.array([[fall for *_, fall in _cases(flaw, strength)] for strength in strengths])
    if flaw in OUTLINE:
        assert falls.min() >= -0.01
        assert (np.diff(falls.mean(1)) > 0).all()  # the more, the stronger
    elif flaw == "missing":
        assert falls.min() >= 0
    elif flaw == "wrong colour":
        assert np.abs(falls).max() <= 0.02
    else:
        assert np.abs(falls.mean()) <= 0.06


@pytest.mark.parametrize(("flaw", "strength"), [(f, s) for f, s in PLANTED if f != "missing"])
def test_planted_flaws_are_marked_where_they_are(flaw, strength):
    assert np.median([iou for _, _, iou, *_ in _cases(flaw, strength)]) >= 0.5


def test_planted_flaws_all_in_all():
    cases = [case for flaw, strength in PLANTED for case in _cases(flaw, strength)]
    assert np.mean([fell and stayed for fell, stayed, *_ in cases]) >= 0.95
    assert np.mean([words for _, _, _, words, *_ in cases]) >= 0.99
    assert np.mean([kind for *_, kind, _ in cases]) >= 0.99


def test_verdicts_survive_softness_and_noise():
    rng = np.random.default_rng(2)
    same = []
    for index, scene in enumerate(_scenes(100, seed=3)):
        picture = render(scene.things)
        if index % 3 == 0:
            picture = plant(scene, str(rng.choice(applicable(scene))), float(rng.uniform(0.3, 1)), rng).picture
        sharp, soft = (judge(one, str(scene.request)) for one in (picture, _softened(picture, rng)))
        same.append(sharp.satisfied == soft.satisfied and sharp.words == soft.words)
    assert np.mean(same) >= 0.98  # with 0.93 at heart it would be so once in forty times


def test_nothing_drawn():
    verdict = judge(np.full((SIZE, SIZE, 3), GROUND, np.uint8), "two red circles and a blue star")
    assert verdict.flaws == {"missing"}
    assert verdict.words == (0, 1, 2, 4, 5, 6)
    assert verdict.alignment == 0
    assert verdict.plausibility == 0.5
    assert verdict.overall < 0.2
    assert not verdict.implausible.any()
    assert not verdict.things


@pytest.mark.parametrize("name", ["noise", "grey", "black"])
def test_pictures_of_nothing_score_low(name):
    rng = np.random.default_rng(6)
    pictures = {
        "noise": rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8),
        "grey": np.full((SIZE, SIZE, 3), 128, np.uint8),
        "black": np.full((SIZE, SIZE, 3), COLOURS["black"], np.uint8),
    }
    verdict = judge(pictures[name], "a black square")
    assert verdict.plausibility < 0.05
    assert verdict.overall < 0.35
    assert verdict.implausible.mean() > 0.5
    assert not verdict.satisfied


def test_scores_are_graded():
    thing = Thing("red", "circle", 32, 32, 14)
    waves = [
        judge(render((Thing("red", "circle", 32, 32, 14, (a, 5, 0.3)),)), "a red circle") for a in (0.1, 0.16, 0.22)
    ]
    assert 1 > waves[0].plausibility > waves[1].plausibility > waves[2].plausibility > 0
    blends = []
    for share in (0.0, 0.3, 0.4, 1.0):  # red turns to blue
        pictures = [render((replace(thing, colour=colour),)).astype(float) for colour in ("red", "blue")]
        blended = (1 - share) * pictures[0] + share * pictures[1]
        blends.append(judge(np.round(blended).astype(np.uint8), "a red circle"))
    assert blends[0].satisfied
    assert blends[0].plausibility > blends[1].plausibility > blends[2].plausibility
    assert blends[3].flaws == {"wrong colour"}
    assert blends[0].overall > blends[1].overall > blends[2].overall


def test_of_two_alike_the_relation_decides():
    caption = "a red circle left of a blue circle"
    right = render((Thing("red", "circle", 16, 32, 10), Thing("blue", "circle", 46, 32, 10)))
    assert judge(right, caption).satisfied
    swapped = judge(right[:, ::-1], caption)
    assert swapped.flaws == {"relation"}
    assert swapped.words == (3, 4)
    twins = judge(render((Thing("blue", "circle", 16, 32, 10), Thing("blue", "circle", 46, 32, 10))), caption)
    assert twins.flaws == {"wrong colour"}
    assert twins.words == (1,)
    assert twins.misaligned[32, 16]
    assert not twins.misaligned[32, 46]


def test_things_that_touch_are_two():
    picture = render((Thing("red", "circle", 20, 32, 10), Thing("red", "circle", 39, 32, 10)))
    verdict = judge(picture, "two red circles")
    assert len(verdict.things) == 2
    assert "missing" not in verdict.flaws


def test_a_thing_on_another_is_a_thing_if_well_drawn():
    picture = render((Thing("blue", "circle", 32, 32, 22), Thing("red", "square", 32, 32, 8)))
    assert judge(picture, "a red square inside a blue circle").satisfied
    assert judge(picture, "a blue circle").flaws == {"extra"}
    exchanged = judge(picture, "a blue square inside a red circle")  # both colours are wrong, and the relation holds
    assert exchanged.flaws == {"wrong colour"}
    assert exchanged.words == (1, 5)


def test_floats_and_bytes_agree():
    scene = _scenes(1, seed=7)[0]
    picture = render(scene.things)
    one, other = judge(picture, str(scene.request)), judge(picture / 255.0, str(scene.request))
    assert one.scores == pytest.approx(other.scores)
    assert one.overall == pytest.approx(overall_of(one.plausibility, one.alignment, one.aesthetics))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        judge(np.zeros((32, 32, 3), np.uint8), "a red circle")
    with pytest.raises(ValueError, match="not finite"):
        judge(np.full((SIZE, SIZE, 3), np.nan), "a red circle")
    with pytest.raises(ValueError, match="no colour"):
        judge(np.zeros((SIZE, SIZE, 3)), "a mauve circle")


def test_reward():
    scenes = _scenes(4, seed=8, flaw="wrong colour")
    captions = [str(scene.request) for scene in scenes]
    rng = np.random.default_rng(9)
    pictures = [render(scene.things) for scene in scenes[:2]]
    flawed = [plant(scene, "wrong colour", 1.0, rng) for scene in scenes[2:]]
    pictures += [one.picture for one in flawed]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    reward = JudgeReward()(images, captions)
    assert reward.total.shape == (4,)
    assert set(reward.terms) == {*SCORES, "satisfied"}
    assert reward.terms["satisfied"].tolist() == [1, 1, 0, 0]
    assert torch.equal(reward.objective, reward.terms["overall"])
    for costs, caption, wrong in zip(
        reward.word_penalties, captions, [(), (), *(f.words for f in flawed)], strict=True
    ):
        assert len(costs) == len(caption.split())
        assert tuple(costs.nonzero().flatten().tolist()) == wrong
    verdict = judge(pictures[2], captions[2])
    for name, mask in (("implausibility", verdict.implausible), ("misalignment", verdict.misaligned)):
        assert torch.equal(reward.heatmaps[name][2], torch.from_numpy(mask).float())
    mapped = JudgeReward(penalty=0.5)(images, captions)
    assert mapped.penalties["misalignment"].shape == (4, SIZE, SIZE)
    assert mapped.penalties["misalignment"].amax((1, 2)).tolist() == [0, 0, 0.5, 0.5]
    assert (mapped.objective <= reward.objective).all()
    assert not JudgeReward.differentiable
    with pytest.raises(ValueError, match="4 images but 3 prompts"):
        JudgeReward()(images, captions[:3])


def test_layouts():
    caption = "a red circle"
    left, right, larger = (
        judge(render((Thing("red", "circle", x, 32, r),)), caption) for x, r in ((20, 10), (40, 10), (20, 16))
    )
    empty = judge(np.full((SIZE, SIZE, 3), GROUND, np.uint8), caption)
    assert layout_distance(left, left) == 0
    assert layout_distance(left, right) == pytest.approx(20 / 64, abs=0.005)
    assert layout_distance(left, larger) == pytest.approx(6 / 64, abs=0.005)
    assert layout_distance(left, empty) == layout_distance(empty, left) == 0.5
    assert layout_distance(empty, empty) == 0
    assert diversity([left, right, left]) == pytest.approx(2 / 3 * 20 / 64, abs=0.005)
    with pytest.raises(ValueError, match="two pictures or more"):
        diversity([left])


def test_what_is_named_exists():
    assert set(KIND.values()) <= set(KINDS)
    assert parse("a red circle").nouns[0].shape in SHAPES
