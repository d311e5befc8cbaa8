"""The pictures of tinyworld: coloured shapes on a plain ground, drawn well, or with one planted flaw.

Pictures are (64, 64, 3) uint8 sRGB arrays, masks (64, 64) bool; x runs right, y runs down, lengths are in pixels.
"""

from dataclasses import dataclass, replace

import numpy as np

from tinyworld.grammar import COLOURS, GROUND, ROOMY, SHAPES, Noun, Request, draw_request, is_held_out

SIZE = 64
_OVERSAMPLING = 4
_GAP = 3.0  # clear ground between two things, so that they stay two components
_MARGIN = 2.0  # clear ground at the border
_REACH = 1.15  # no shape reaches further from its centre than this many radii
_RADII = {1: (11.0, 17.0), 2: (9.0, 12.5), 3: (8.0, 9.5)}
_OUTER_RADII = (20.0, 23.0)
_INNER_RADII = (8.5, 10.0)


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Attributes:
        radius: half the shape's height, about; every shape lies within 1.15 radii of its centre.
        warp: amplitude, number of lobes and phase of a wave laid over the outline, or None for a true outline.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    warp: tuple[float, int, float] | None = None


@dataclass(frozen=True)
class Scene:
    """What is asked for, and what is there: things in drawing order, with the index of the noun each answers."""

    request: Request
    things: tuple[Thing, ...]
    nouns: tuple[int, ...]


def inside_shape(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u, v), in radii from the centre, lie in the ideal shape; broadcast bool."""
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) <= 0.88
        case "triangle":
            return (v <= 0.8) & (np.abs(u) <= (v + 1.0) * (1.05 / 1.8))
        case "diamond":
            return np.abs(u) + np.abs(v) <= 1.12
        case "cross":
            near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
            return (near <= 0.36) & (far <= 1.0)
        case "star":
            # One half of one point is a line from the tip (radius 1.15) to the notch (radius 0.5, 36 degrees on).
            angle = np.arctan2(u, -v)
            sector = np.pi / 5
            folded = np.abs((angle + sector) % (2 * sector) - sector)
            radius = np.hypot(u, v)
            x, y = radius * np.cos(folded), radius * np.sin(folded)
            tip, notch = 1.15, (0.5 * np.cos(sector), 0.5 * np.sin(sector))
            return (x - tip) * notch[1] - y * (notch[0] - tip) <= 0
    raise ValueError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")


def coverage(thing: Thing) -> np.ndarray:
    """(64, 64) float32 in [0, 1]: the share of each pixel that the thing covers."""
    grid = (np.arange(SIZE * _OVERSAMPLING) + 0.5) / _OVERSAMPLING
    reach = (_REACH + (thing.warp[0] if thing.warp else 0)) * thing.radius + 1
    columns, rows = (np.abs(grid - centre) <= reach for centre in (thing.x, thing.y))
    u = (grid[columns][None, :] - thing.x) / thing.radius
    v = (grid[rows][:, None] - thing.y) / thing.radius
    if thing.warp:
        amplitude, lobes, phase = thing.warp
        stretch = 1 + amplitude * np.sin(lobes * np.arctan2(v, u) + phase)
        u, v = u / stretch, v / stretch
    fine = np.zeros((SIZE * _OVERSAMPLING,) * 2, np.float32)
    fine[np.ix_(rows, columns)] = inside_shape(thing.shape, u, v)
    return fine.reshape(SIZE, _OVERSAMPLING, SIZE, _OVERSAMPLING).mean(axis=(1, 3))


def render(things: tuple[Thing, ...], bite: tuple[int, Thing] | None = None) -> np.ndarray:
    """(64, 64, 3) uint8: the things drawn in order on the ground; from one thing, by index, a `bite` is left out."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = GROUND
    for index, thing in enumerate(things):
        cover = coverage(thing)[..., None]
        if bite and bite[0] == index:
            cover = cover * (1 - coverage(bite[1])[..., None])
        canvas += cover * (np.array(COLOURS[thing.colour], np.float32) - canvas)
    return np.round(canvas).astype(np.uint8)


def _fits(thing: Thing, others: list[Thing]) -> bool:
    reach = _REACH * thing.radius
    if not all(reach + _MARGIN <= centre <= SIZE - reach - _MARGIN for centre in (thing.x, thing.y)):
        return False
    return all(
        np.hypot(thing.x - other.x, thing.y - other.y) >= reach + _REACH * other.radius + _GAP for other in others
    )


def related(relation: str, first: Thing, second: Thing) -> bool:
    """Whether two things that do not overlap stand clearly in a relation of place: more beside than above, or so."""
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation == "left of" else (down, right)
    return along > abs(across) + 2


def lay_out(request: Request, rng: np.random.Generator) -> Scene:
    """A flawless scene for a request: sizes and places at random, nothing touching but what is inside another."""
    kinds = [(index, noun) for index, noun in enumerate(request.nouns) for _ in range(noun.count)]
    if request.relation == "inside":
        return _lay_inside(request, rng)
    while True:
        things: list[Thing] = []
        for _, noun in kinds:
            for _ in range(30):
                radius = rng.uniform(*_RADII[len(kinds)])
                x, y = rng.uniform(radius, SIZE - radius, size=2)
                thing = Thing(noun.colour, noun.shape, float(x), float(y), float(radius))
                if _fits(thing, things):
                    things.append(thing)
                    break
            else:
                break  # crowded: start again
        if len(things) == len(kinds) and (not request.relation or related(request.relation, things[0], things[1])):
            return Scene(request, tuple(things), tuple(index for index, _ in kinds))


def _lay_inside(request: Request, rng: np.random.Generator) -> Scene:
    inner, outer = request.nouns
    radius = rng.uniform(*_OUTER_RADII)
    reach = _REACH * radius + _MARGIN
    x, y = rng.uniform(reach, SIZE - reach, size=2)
    shift = rng.uniform(-2.5, 2.5, size=2)
    small = rng.uniform(*_INNER_RADII)
    things = (
        Thing(outer.colour, outer.shape, float(x), float(y), float(radius)),
        Thing(inner.colour, inner.shape, float(x + shift[0]), float(y + shift[1]), float(small)),
    )
    return Scene(request, things, (1, 0))


# Flaws -----------------------------------------------------------------------------------------------------------

FLAWS = ("wrong colour", "wrong shape", "warped", "bitten", "blotched", "missing", "extra", "swapped")
"""What can be wrong with a picture. The first two, and the last three, break the caption; the others the outline."""


@dataclass(frozen=True)
class Flawed:
    """A picture with one planted flaw, and the truth about it.

    Attributes:
        picture: (64, 64, 3) uint8.
        region: (64, 64) bool, where the flaw is to be seen; empty where a thing is missing.
        words: indices of the caption's words that the flaw belies.
        things: what is drawn now.
    """

    picture: np.ndarray
    region: np.ndarray
    words: tuple[int, ...]
    things: tuple[Thing, ...]


def applicable(scene: Scene) -> tuple[str, ...]:
    """The flaws that can be planted in a scene."""
    kinds = list(FLAWS)
    if len(scene.things) == 1:
        kinds.remove("missing")  # an empty picture teaches nothing
    if len(scene.things) == 3 or scene.request.relation == "inside":
        kinds.remove("extra")  # no room
    if scene.request.relation is None or (
        scene.request.relation == "inside" and scene.request.nouns[0].shape not in ROOMY
    ):
        kinds.remove("swapped")
    return tuple(kinds)


def plant(scene: Scene, flaw: str, strength: float, rng: np.random.Generator) -> Flawed:
    """Plant one flaw in a scene; `strength` in (0, 1] matters to warped, bitten and blotched outlines.

    The result never shows a held-out composition that the scene did not already have.

    Raises:
        ValueError: the flaw cannot be planted in this scene; see `applicable`.
    """
    if flaw not in applicable(scene):
        raise ValueError(f"flaw {flaw!r} cannot be planted here; use one of {', '.join(applicable(scene))}")
    if flaw in ("warped", "bitten", "blotched"):
        return _spoil(scene, flaw, strength, rng)
    for _ in range(100):
        things, changed, words = _misrepresent(scene, flaw, rng)
        if is_held_out(scene.request) or not is_held_out(_shown(things)):
            break
    region = np.zeros((SIZE, SIZE), bool)
    for index in changed:
        region |= coverage(things[index]) > 0.5
    return Flawed(render(things), region, words, things)


def _shown(things: tuple[Thing, ...]) -> Request:
    """A request (not a well-formed caption, perhaps) for exactly what is drawn."""
    counts: dict[tuple[str, str], int] = {}
    for thing in things:
        counts[thing.colour, thing.shape] = counts.get((thing.colour, thing.shape), 0) + 1
    return Request(tuple(Noun(count, *kind) for kind, count in counts.items()))


def _misrepresent(
    scene: Scene, flaw: str, rng: np.random.Generator
) -> tuple[tuple[Thing, ...], tuple[int, ...], tuple[int, ...]]:
    """Things as drawn, indices of those that are wrong among them, indices of the words that are belied."""
    things, request = list(scene.things), scene.request
    index = int(rng.integers(len(things)))
    thing, noun = things[index], request.nouns[scene.nouns[index]]
    match flaw:
        case "wrong colour":
            taken = {thing.colour} | ({t.colour for t in things} if request.relation == "inside" else set())
            colour = str(rng.choice([c for c in COLOURS if c not in taken]))
            things[index] = replace(thing, colour=colour)
            return tuple(things), (index,), (noun.first_word + 1,)
        case "wrong shape":
            is_outer = request.relation == "inside" and index == 0
            shape = str(rng.choice([s for s in (ROOMY if is_outer else SHAPES) if s != thing.shape]))
            things[index] = replace(thing, shape=shape)
            return tuple(things), (index,), (noun.first_word + 2,)
        case "missing":
            del things[index]
            first = noun.first_word
            return tuple(things), (), (first,) if noun.count > 1 else (first, first + 1, first + 2)
        case "extra":
            while True:
                radius = rng.uniform(*_RADII[3])
                x, y = rng.uniform(radius, SIZE - radius, size=2)
                kind = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
                extra = Thing(*kind, float(x), float(y), float(radius))
                if _fits(extra, things):
                    break
                if rng.random() < 0.02:  # no room: make some
                    things = [replace(t, radius=max(8.0, t.radius * 0.85)) for t in things]
            counted = [n.first_word for n in request.nouns if (n.colour, n.shape) == kind]
            return (*things, extra), (len(things),), tuple(counted)
        case "swapped":
            one, other = things[:2]
            if request.relation == "inside":  # the outer becomes the inner
                things[:2] = [
                    replace(one, colour=other.colour, shape=other.shape),
                    replace(other, colour=one.colour, shape=one.shape),
                ]
            else:
                things[:2] = [replace(one, x=other.x, y=other.y), replace(other, x=one.x, y=one.y)]
            return tuple(things), (0, 1), request.relation_words
    raise AssertionError(flaw)


def _spoil(scene: Scene, flaw: str, strength: float, rng: np.random.Generator) -> Flawed:
    things = list(scene.things)
    index = int(rng.integers(len(things)))
    thing = things[index]
    before = coverage(thing) > 0.5
    if flaw == "warped":
        amplitude = 0.12 + 0.16 * strength
        # Four lobes may turn a circle, a square and a diamond into each other: that would be a wrong shape.
        lobes = int(rng.choice((3, 5) if thing.shape in ROOMY else (3, 4, 5)))
        things[index] = replace(thing, warp=(amplitude, lobes, float(rng.uniform(0, 2 * np.pi))))
        return Flawed(render(tuple(things)), before | (coverage(things[index]) > 0.5), (), tuple(things))
    # Both flaws are disks, about: a bite sits on the outline, a blotch of another colour anywhere within. What is drawn
    # over the thing stays whole.
    shown = np.prod([1 - coverage(later) for later in things[index + 1 :]], axis=0) * coverage(thing)
    inside = np.argwhere(before & (shown > 0.5))
    edge = inside[[not before[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].all() for y, x in inside]]
    candidates = edge if flaw == "bitten" else inside
    y, x = candidates[rng.integers(len(candidates))]
    disk = Thing(thing.colour, "circle", float(x), float(y), float((0.3 + 0.35 * strength) * thing.radius))
    if flaw == "bitten":
        region = (coverage(disk) * shown) > 0.25
        return Flawed(render(tuple(things), (index, disk)), region, (), tuple(things))
    disk = replace(disk, warp=(0.25, 3, float(rng.uniform(0, 2 * np.pi))))
    ink = COLOURS[str(rng.choice([c for c in COLOURS if c != thing.colour]))]
    cover = coverage(disk) * shown
    picture = render(tuple(things)).astype(np.float32)
    picture += cover[..., None] * (np.array(ink, np.float32) - picture)
    return Flawed(np.round(picture).astype(np.uint8), cover > 0.25, (), tuple(things))


def draw_scene(rng: np.random.Generator, flawed: float) -> tuple[Request, np.ndarray]:
    """A training pair: a caption's meaning that is not held out, and a picture that is flawed with this probability."""
    while is_held_out(request := draw_request(rng)):
        pass
    scene = lay_out(request, rng)
    if rng.random() < flawed:
        flaw = str(rng.choice(applicable(scene)))
        return request, plant(scene, flaw, float(rng.uniform(0.3, 1.0)), rng).picture
    return request, render(scene.things)
