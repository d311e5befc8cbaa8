import numpy as np
import pytest

from tinyworld.fit import cover
from tinyworld.grammar import COLOURS, GROUND, ROOMY, SHAPES, draw_request, parse
from tinyworld.scenes import FLAWS, SIZE, Thing, applicable, coverage, inside_shape, lay_out, plant, related, render


def _scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [lay_out(draw_request(rng), rng) for _ in range(count)]


def test_areas_are_the_shapes_own():
    areas = {"circle": np.pi, "square": 1.76**2, "diamond": 2 * 1.12**2, "cross": 4 * 0.72 - 0.72**2, "triangle": 1.89}
    for shape, area in areas.items():
        drawn = coverage(Thing("red", shape, 32, 32, 16)).sum() / 16**2
        assert drawn == pytest.approx(area, rel=0.03), shape


def test_closed_form_cover_agrees_with_the_renderer():
    for shape in SHAPES:
        thing = Thing("red", shape, 30.3, 33.6, 11.2)
        difference = np.abs(cover(shape, thing.x, thing.y, thing.radius) - coverage(thing))
        assert difference.max() < 0.4
        assert difference.sum() / coverage(thing).sum() < 0.025, shape


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="'blob' is unknown"):
        inside_shape("blob", np.zeros(1), np.zeros(1))


def test_flawless_scenes_hold_what_is_asked_for():
    for scene in _scenes(200):
        request = scene.request
        for index, noun in enumerate(request.nouns):
            mine = [thing for thing, k in zip(scene.things, scene.nouns, strict=True) if k == index]
            assert [(thing.colour, thing.shape) for thing in mine] == [(noun.colour, noun.shape)] * noun.count
        if request.relation in ("left of", "above"):
            assert related(request.relation, *scene.things[:2])
        if request.relation == "inside":
            outer, inner = (coverage(thing) for thing in scene.things)
            assert (outer[inner > 0] == 1).all()
        else:
            assert sum((coverage(thing) > 0).astype(int) for thing in scene.things).max() == 1, "things touch"


def test_pictures_show_pure_colours_on_the_ground():
    picture = render((Thing("blue", "square", 20, 20, 10), Thing("pink", "circle", 45, 45, 10)))
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == GROUND
    assert tuple(picture[20, 20]) == COLOURS["blue"]
    assert tuple(picture[45, 45]) == COLOURS["pink"]


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_change_the_picture_where_they_say(flaw):
    rng = np.random.default_rng(2)
    planted = 0
    for scene in _scenes(60, seed=3):
        if flaw not in applicable(scene):
            with pytest.raises(ValueError, match="cannot be planted"):
                plant(scene, flaw, 1.0, rng)
            continue
        planted += 1
        clean, flawed = render(scene.things), plant(scene, flaw, 1.0, rng)
        assert (flawed.picture != clean).any()
        assert flawed.region.any() == (flaw != "missing")
        assert set(flawed.words) <= set(range(len(str(scene.request).split())))
        assert bool(flawed.words) or flaw in ("warped", "bitten", "blotched", "extra")
        if flaw in ("bitten", "blotched"):
            away = (np.abs(flawed.picture.astype(int) - clean).sum(-1) > 200) & ~flawed.region
            assert away.sum() <= 0.1 * flawed.region.sum(), "what is outside of the region stays"
    assert planted >= 8


def test_what_lies_inside_a_flawed_thing_stays_whole():
    rng = np.random.default_rng(4)
    scene = lay_out(parse("a red square inside a blue circle"), rng)
    inner = coverage(scene.things[1]) > 0.9
    for _ in range(30):
        for flaw in ("bitten", "blotched"):
            flawed = plant(scene, flaw, 1.0, rng)
            outer_spoiled = not (flawed.region & (coverage(scene.things[1]) > 0.5)).any()
            if outer_spoiled:
                assert (flawed.picture[inner] == COLOURS["red"]).all()


def test_warps_do_not_turn_roomy_shapes_into_each_other():
    rng = np.random.default_rng(5)
    for shape in ROOMY:
        scene = lay_out(parse(f"a red {shape}"), rng)
        lobes = {plant(scene, "warped", 0.5, rng).things[0].warp[1] for _ in range(30)}
        assert lobes == {3, 5}
